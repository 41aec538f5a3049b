"""What the page works with: the services and the lines in front of them, the ratings, the signer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.client.clients import AsyncAudioClient
from services.runtime.tokens import check_token
from services.web.backend import Backend
from services.web.settings import WebSettings
from services.web.studio.making import Judge, Visitor
from services.web.waiting import WaitingRoom

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner
    from services.ratings.store import RatingStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """What the page works with."""

    backend: Backend
    settings: WebSettings
    room: WaitingRoom
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
        return self.backend.client_for(_given(token), challenger=challenger)

    def visitor(self, token: str, *, challenger: bool = False) -> Visitor:
        """Return what calls for the holder of a token, also where a queue is full. Raises as `client`."""
        return Visitor(
            client=self.client(token, challenger=challenger),
            room=self.room,
            token=_given(token),
            generator="challenger" if challenger else "generation",
        )


def _given(token: str) -> str | None:
    return check_token("token", token) if token.strip() else None
