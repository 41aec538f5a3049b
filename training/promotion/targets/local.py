"""Promotion without a cluster: a service switches its model, and the challenger is a process of ours."""

import os
import time
from contextlib import AbstractContextManager, ExitStack
from typing import Final

from services.client import TLS, AudioClient
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
from training.promotion.target import Pin, digest_of, shown_pin
from training.promotion.targets.asking import (
    CALL_SECONDS,
    CALLS,
    place_of,
    served_model,
    settle,
    wrong_answer,
)
from training.promotion.targets.locks import FileLock, file_lock

_KEPT: Final = ("MILONGA_CACHE", "MILONGA_DEVICE", "MILONGA_DTYPE", "MILONGA_THREADS", "MILONGA_BATCH_SHAPES")
"""Settings that the challenger shares with us; ports and certificates would be the service's own."""
_POLL_SECONDS: Final = 0.5


class LocalTarget:
    """A generation service of this machine, or one that is reached by its address. See `Target`."""

    def __init__(self, address: str, registry: Registry, *, token: str, tls: TLS | None = None) -> None:
        """Nothing is called yet.

        Args:
            address: of the service, which must have its operator rpcs enabled.
            registry: where what it serves is looked up.
            token: of its operators.
            tls: how it is spoken to.
        """
        self._address, self._registry, self._token, self._tls = address, registry, token, tls
        self._challenger: tuple[Pin, str, ExitStack] | None = None

    @property
    def place(self) -> str:
        """See `Target`: the address; what only this machine reaches, under its name."""
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
        """See `Target`. The challenger is a process of this very installation."""

    def check_reach(self) -> None:
        """See `Target`: whether the service takes our token."""
        with AudioClient(self._address, tls=self._tls, retries=0) as client:
            try:
                # Names no model, and so changes nothing: it is refused, for that if the token is right.
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
        """See `Target`: the model URI of what answers, as far as one is known."""
        served = served_model(self._address, self._tls)
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
                raise RolloutError(f"the challenger does not come up: {error}") from error
            settle(
                lambda: wrong_answer(lambda: served_model(service.target), digest_of(pin), "the challenger")
            )
            self._challenger = (pin, service.target, stack.pop_all())
        return service.target

    def clip_client(self, address: str, timeout: float) -> AudioClient:
        """See `Target`. The challenger is ours, and speaks no TLS."""
        return AudioClient(address, timeout=timeout, retries=4)

    def stop_challenger(self) -> None:
        """See `Target`. One that another promoter started ended with it."""
        if self._challenger is not None:
            stack = self._challenger[2]
            self._challenger = None
            stack.close()

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """See `Target`. To what was served before any pin there is no way back but a restart."""
        if pin is not None:
            self._switch(pin, seconds)
        elif (served := self.current_pin()) is not None:
            raise RolloutError(
                f"the service at {self._address} serves {shown_pin(served)} now, and what it served before "
                "is in no registry; restart it to serve that"
            )

    def wait(self, pin: Pin, seconds: float) -> None:
        """See `Target`. A switch is whole when it is answered."""

    def verify(self, digest: str) -> None:
        """See `Target`."""
        who = f"the service at {self._address}"
        settle(lambda: wrong_answer(lambda: served_model(self._address, self._tls), digest, who), calls=CALLS)

    def _switch(self, pin: Pin, seconds: float) -> None:
        end = time.monotonic() + seconds
        with AudioClient(self._address, tls=self._tls, retries=0) as client:
            while True:
                try:
                    client.switch_model(pin, token=self._token, timeout=max(1.0, end - time.monotonic()))
                    return
                except AlreadyUnderWayError as error:
                    # Perhaps one of ours, whose answer nobody waited for.
                    if time.monotonic() > end:
                        raise RolloutError(f"the service at {self._address}: {error}") from error
                    time.sleep(_POLL_SECONDS)
                except MilongaError as error:
                    if type(error) is MilongaError or isinstance(error, ModelError | DeadlineExceededError):
                        # Refused, too slow, a fault of the service's, or it has no operator rpc.
                        raise RolloutError(
                            f"the service at {self._address} does not switch to {pin}: {error}"
                        ) from error
                    raise
