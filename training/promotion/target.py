"""What a promotion needs of what it promotes to."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from services.api.generation import ClipMaker
from services.weights.uri import ModelURI

Pin = str
"""A model URI with its digest: ``models:/milonga-tango/7#sha256:…``."""

Tell = Callable[[str], None]
"""Says a line about what goes on, to people."""


class Lock(Protocol):
    """Held while a promotion runs. Nobody else may change the target meanwhile."""

    def check(self) -> None:
        """Raise `BusyError` if it is held no more. Called before every change."""


class Target(Protocol):
    """What serves. Every method may be called again after whatever stopped it, and then does what is left.

    All raise `ServiceUnavailableError` where the target can't be reached or does not let us, and
    `InvalidInputError` where something is missing that should have been set up.
    """

    @property
    def place(self) -> str:
        """Which target this is, the same from wherever it is promoted to: the ledger's key."""

    @property
    def serving(self) -> str:
        """How its challenger serves (image, resources, machine). Clips of another way are not compared."""

    def lock(self) -> AbstractContextManager[Lock]:
        """Exclude other promotions for the time of the context. Raises `BusyError`."""

    @property
    def idle(self) -> bool:
        """Whether nothing is to serve: there is nothing to wait for, and nobody to ask."""

    def check_setup(self, *, challenger: bool) -> None:
        """Raise `InvalidInputError` where it serves nothing, or its challenger would run something else."""

    def check_reach(self) -> None:
        """Raise where what serves can't be asked, or changed, because of us: rights, TLS, a token.

        What serves may be broken: that is what a rollback is for.
        """

    def current_pin(self) -> Pin | None:
        """What is served, or is to be; None where nothing was pinned yet."""

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        """Serve `pin` where no traffic comes, in place of an earlier challenger; its address.

        Raises `RolloutError` where it is not ready within `seconds`, or can be seen never to be.
        """

    def clip_client(self, address: str, timeout: float) -> ClipMaker:
        """Who asks the challenger at `address` for clips, in up to `timeout` seconds each. Calls nothing."""

    def stop_challenger(self) -> None:
        """Serve no challenger any more."""

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """Begin to serve `pin`, without a pause. None takes the pin away.

        Raises `RolloutError` where it is refused, or does not begin within `seconds`.
        """

    def wait(self, pin: Pin, seconds: float) -> None:
        """Return when nothing but `pin` is served.

        Raises `RolloutError` where that is not so within `seconds`, or can be seen never to be.
        """

    def verify(self, digest: str) -> None:
        """Ask everything that serves. Raises `RolloutError` where something answers with another digest."""


def digest_of(pin: Pin) -> str:
    """The digest of a pin."""
    digest = ModelURI.parse(pin).digest
    assert digest is not None
    return digest


def version_of(pin: Pin) -> str:
    """The version in the pin of a registered model."""
    return pin.partition("#")[0].rpartition("/")[2]


def shown_pin(pin: Pin | None) -> str:
    """A pin for people: without its digest."""
    return pin.partition("#")[0].removeprefix("models:/").replace("/", " version ") if pin else "nothing"
