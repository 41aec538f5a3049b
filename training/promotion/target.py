"""The port between a promotion and its target, and the pin."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from services.api.generation import ClipMaker
from services.weights.uri import ModelURI

Pin = str
"""A model URI with its digest: ``models:/milonga-tango/7#sha256:…``."""

Report = Callable[[str], None]
"""Prints a line of progress."""


class Lock(Protocol):
    """Excludes other promotions of the target while it is held."""

    def check(self) -> None:
        """Raise `BusyError` if the lock was lost. Called before every change."""


class Target(Protocol):
    """A service that is promoted to. Every method is idempotent: called again after a failure, it completes.

    All raise `ServiceUnavailableError` where the target can't be reached or does not permit the call, and
    `InvalidInputError` where its setup is incomplete.
    """

    @property
    def place(self) -> str:
        """Name of the target, the same from every machine that promotes to it: the ledger's key."""

    @property
    def serving(self) -> str:
        """Environment of the challenger (image, resources, machine). Clips of another are not compared."""

    def lock(self) -> AbstractContextManager[Lock]:
        """Hold the lock inside the context. Raises `BusyError`."""

    @property
    def idle(self) -> bool:
        """Whether the target is scaled to 0, so that there is nothing to wait for or to verify."""

    def check_setup(self, *, challenger: bool) -> None:
        """Raise `InvalidInputError` if nothing serves, or the challenger would run something else."""

    def check_reach(self) -> None:
        """Raise where rights, TLS or a token of the caller prevent the calls that a promotion makes.

        A service that is broken passes: it may be why a rollback is wanted.
        """

    def current_pin(self) -> Pin | None:
        """Return the pin that is served, or is being rolled out; None if nothing was pinned yet."""

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        """Start a challenger without traffic on `pin`, replacing an earlier one; return its address.

        Raises `RolloutError` if it is not ready within `seconds`, or has failed for good.
        """

    def clip_client(self, address: str, timeout: float) -> ClipMaker:
        """Return a client of the challenger at `address`; `timeout` in seconds per clip. Makes no call."""

    def stop_challenger(self) -> None:
        """Stop the challenger."""

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """Start to roll out `pin`, without interruption of the service. None removes the pin.

        Raises `RolloutError` if the pin is refused, or the rollout does not start within `seconds`.
        """

    def wait(self, pin: Pin, seconds: float) -> None:
        """Return when nothing but `pin` is served.

        Raises `RolloutError` if that takes longer than `seconds`, or has failed for good.
        """

    def verify(self, digest: str) -> None:
        """Query everything that serves. Raises `RolloutError` if an answer has another digest."""


def pinned_digest(pin: Pin) -> str:
    """Return the digest of a pin."""
    digest = ModelURI.parse(pin).digest
    assert digest is not None
    return digest


def version_of(pin: Pin) -> str:
    """Return the version number in the pin of a registered model."""
    return pin.partition("#")[0].rpartition("/")[2]


def shown_pin(pin: Pin | None) -> str:
    """Return a pin as messages show it, without its digest; ``nothing`` for None."""
    return pin.partition("#")[0].removeprefix("models:/").replace("/", " version ") if pin else "nothing"
