"""Promotion on one machine: a service switches its model, and the challenger is a child process."""

import os
import time
from contextlib import AbstractContextManager, ExitStack
from typing import Final

from services.client import AudioClient, ServiceOptions
from services.errors import (
    AlreadyUnderWayError,
    DeadlineExceededError,
    InvalidInputError,
    MilongaError,
    ModelError,
    ServiceUnavailableError,
)
from services.processes import ServicePlan, free_port, running
from services.weights.registry import cache_folder
from training.promotion.errors import RolloutError
from training.promotion.ledger import whoami
from training.promotion.registry import Registry
from training.promotion.target import Pin, pinned_digest, shown_pin
from training.promotion.targets.locks import FileLock, file_lock
from training.promotion.targets.probing import (
    CALL_SECONDS,
    CALLS,
    place_of,
    poll_until,
    probe,
    served_model,
)

_KEPT: Final = ("MILONGA_CACHE", "MILONGA_DEVICE", "MILONGA_DTYPE", "MILONGA_THREADS", "MILONGA_BATCH_SHAPES")
"""Variables that the challenger inherits; others, like ports and certificates, are the service's."""
_POLL_SECONDS: Final = 0.5


class LocalTarget:
    """A generation service at an address, usually of this machine. Implements `Target`."""

    def __init__(
        self, address: str, registry: Registry, *, token: str, connection: ServiceOptions | None = None
    ) -> None:
        """Make no call yet.

        Args:
            address: address of the service, whose operator rpcs must be enabled.
            registry: registry of the versions that it serves.
            token: the service's operator token.
            connection: how the service is reached.
        """
        self._address, self._registry, self._token = address, registry, token
        self._connection = connection or ServiceOptions()
        self._challenger: tuple[Pin, str, ExitStack] | None = None

    @property
    def place(self) -> str:
        """See `Target`: the address; a loopback address is replaced by the name of this machine."""
        return place_of("local", self._address)

    @property
    def serving(self) -> str:
        """See `Target`."""
        settings = [f"{name}={os.environ[name]}" for name in _KEPT[1:] if name in os.environ]
        return " ".join(["process", whoami().rpartition("@")[2], *settings])

    def lock(self) -> AbstractContextManager[FileLock]:
        """See `Target`."""
        return file_lock(self.place)

    @property
    def idle(self) -> bool:
        """See `Target`."""
        return False

    def check_setup(self, *, challenger: bool) -> None:
        """See `Target`. The challenger runs the same installation as this process."""

    def check_reach(self) -> None:
        """See `Target`: whether the service accepts the token."""
        with self._connection.open(self._address, retries=0) as client:
            try:
                # Without a model nothing changes: refused for that, where the token is right.
                client.switch_model("", token=self._token, timeout=CALL_SECONDS)
            except InvalidInputError as error:
                if "model_uri" not in str(error):
                    raise
            except MilongaError as error:
                if type(error) is MilongaError:
                    raise ServiceUnavailableError(
                        f"the service at {self._address} can't be switched: {error}"
                    ) from error
                raise

    def current_pin(self) -> Pin | None:
        """See `Target`: the pin of the served weights; None if they are in no registry."""
        served = served_model(self._address, self._connection)
        return self._registry.pin_of(served.name, served.version, served.digest)

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        """See `Target`."""
        if self._challenger is not None and self._challenger[0] == pin:
            return self._challenger[1]
        self.stop_challenger()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MILONGA_") or k in _KEPT}
        environment = {**kept, "MLFLOW_TRACKING_URI": self._registry.uri}
        logs = cache_folder() / "promotion" / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        plan = ServicePlan(name="generation", arguments=("--model", pin), address=f"127.0.0.1:{free_port()}")
        with ExitStack() as stack:
            (service,) = stack.enter_context(running([plan], logs=logs, environment=environment))
            try:
                service.wait_until_serving(seconds)
            except ServiceUnavailableError as error:
                raise RolloutError(f"the challenger failed: {error}") from error
            poll_until(
                lambda: probe(lambda: served_model(service.target), pinned_digest(pin), "the challenger")
            )
            self._challenger = (pin, service.target, stack.pop_all())
        return service.target

    def clip_client(self, address: str, timeout: float) -> AudioClient:
        """See `Target`. The challenger is a child process, without TLS."""
        return AudioClient(address, timeout=timeout, retries=4)

    def stop_challenger(self) -> None:
        """See `Target`. A challenger of another promoter has ended with its process."""
        if self._challenger is not None:
            stack = self._challenger[2]
            self._challenger = None
            stack.close()

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """See `Target`. Unpinned weights that were served before can only be served again by a restart."""
        if pin is not None:
            self._switch(pin, seconds)
        elif (served := self.current_pin()) is not None:
            raise RolloutError(
                f"the service at {self._address} serves {shown_pin(served)} now, and what it served before "
                "is in no registry; restart it to serve that"
            )

    def wait(self, pin: Pin, seconds: float) -> None:
        """See `Target`. A switch is complete when it is answered."""

    def verify(self, digest: str) -> None:
        """See `Target`."""
        service = f"the service at {self._address}"
        poll_until(
            lambda: probe(lambda: served_model(self._address, self._connection), digest, service), calls=CALLS
        )

    def _switch(self, pin: Pin, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._connection.open(self._address, retries=0) as client:
            while True:
                try:
                    client.switch_model(pin, token=self._token, timeout=max(1.0, end - time.monotonic()))
                    return
                except AlreadyUnderWayError as error:
                    # Perhaps an earlier switch of this promotion, whose answer was lost.
                    if time.monotonic() > end:
                        raise RolloutError(f"the service at {self._address}: {error}") from error
                    time.sleep(_POLL_SECONDS)
                except MilongaError as error:
                    if type(error) is MilongaError or isinstance(error, ModelError | DeadlineExceededError):
                        # Refused, too slow, a bug in the service, or operator rpcs are disabled.
                        raise RolloutError(
                            f"the service at {self._address} does not switch to {pin}: {error}"
                        ) from error
                    raise
