"""What the page works with: the services, the ratings, the signer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.client.clients import AsyncAudioClient
from services.runtime.tokens import check_token
from services.web.backend import Backend
from services.web.settings import WebSettings
from services.web.studio.making import Judge

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner
    from services.ratings.store import RatingStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """What the page works with."""

    backend: Backend
    settings: WebSettings
    store: "RatingStore | None" = None
    signer: "ClipSigner | None" = None

    @property
    def judges(self) -> tuple[Judge, ...]:
        """Services with an address that judge clips."""
        addresses: dict[Judge, str | None] = {
            "scoring": self.settings.scoring,
            "reward": self.settings.reward,
            "captioning": self.settings.captioning,
        }
        return tuple(name for name, address in addresses.items() if address)

    def client(self, token: str, *, challenger: bool = False) -> AsyncAudioClient:
        """Return the client that calls for the holder of a token; empty: for an anonymous caller.

        Raises as `Backend.client_of`.
        """
        given = check_token("token", token) if token.strip() else None
        return self.backend.client_for(given, challenger=challenger)
