"""Promotion into a Triton server: new weights are loaded beside the old, verified, and then served alone.

The pin is the version_policy of ``tango/config.pbtxt`` in the repository that the server reads. The server
must be in explicit mode (``--model-control-mode=explicit``). The challenger is a model of its own there, with
the same configuration and code.
"""

import contextlib
import hashlib
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.client import TLS, ModelVersion
from services.errors import (
    DeadlineExceededError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ServiceUnavailableError,
)
from services.inference.triton.repository import Exported, ModelRepository, Weights
from services.weights.registry import fetch
from services.weights.uri import ModelURI, resolve
from training.promotion.errors import RolloutError
from training.promotion.registry import Registry
from training.promotion.target import Pin, digest_of, shown_pin, version_of
from training.promotion.targets.asking import CALLS, VERIFY_SECONDS, check_tls, place_of, settle, wrong_answer
from training.promotion.targets.locks import FileLock, file_lock
from training.promotion.targets.triton_client import State, TritonClient, TritonClips

MODEL: Final = "tango"
CHALLENGER: Final = "tango-challenger"
"""Name of the model that gets no traffic."""
DEFAULT_PORT: Final = 8001
ASK_SECONDS: Final = 120.0
"""For the clip of one step that tells the weights: it waits its turn among everybody's."""

_PUT_BACK_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.25
_NOBODY: Final = "milonga-no-such-model"


class TritonTarget:
    """The model `tango` of one Triton server. See `Target`."""

    def __init__(
        self,
        address: str,
        repository: ModelRepository,
        registry: Registry,
        *,
        tls: TLS | None = None,
        token: str = "",
        verify_seconds: float = VERIFY_SECONDS,
    ) -> None:
        """Nothing is called yet.

        Args:
            address: HOST:PORT of the server's gRPC endpoint; without a port `DEFAULT_PORT`.
            repository: the one that the server reads.
            registry: where versions are fetched from.
            tls: how the server is spoken to.
            token: of its operators, where loading is restricted (`triton_client.RESTRICTION`).
            verify_seconds: see `VERIFY_SECONDS`.
        """
        named = address.rpartition("]")[2]  # the colons before are an IPv6 address'
        self._address = address if ":" in named else f"{address}:{DEFAULT_PORT}"
        self._who, self._where = f"the Triton at {self._address}", repository.storage.place
        self._repository, self._registry, self._tls, self._token = repository, registry, tls, token
        self._verify = verify_seconds
        self._challenger: Pin | None = None
        self._first: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """See `Target`: the address; what only this machine reaches, under its name."""
        return place_of("triton", self._address)

    @property
    def serving(self) -> str:
        """See `Target`: the server, and how its repository has the model run."""
        with self._client() as client:
            name, version = client.server()
        config = self._config(CHALLENGER).SerializeToString(deterministic=True)
        return f"{self.place} {name} {version} {hashlib.sha256(config).hexdigest()[:16]}"

    def lock(self) -> AbstractContextManager[FileLock]:
        """See `Target`. Promoters of one server run on one machine."""
        return file_lock(self.place)

    @property
    def idle(self) -> bool:
        """See `Target`."""
        return False

    def check_setup(self, *, challenger: bool) -> None:
        """See `Target`: that the repository is the server's. One that serves nothing is believed."""
        pinned = set(self._pinned())
        with self._client() as client, self._reaching():
            self._check_server(client)
            states = client.versions(MODEL)
        ready = _ready(states)
        wrong = f"serves {_listed(ready)}" if ready and ready != pinned else ""
        if not states:
            wrong = f"does not know {MODEL}"
        if not wrong and ready:
            (highest, weights) = self._highest()
            with contextlib.suppress(MilongaError):  # broken, which is what a rollback is for
                found = self._ask("").digest
                wrong = f"serves {found}" if found != weights.digest else ""
                pinned = {highest}
        if wrong:
            raise InvalidInputError(
                FieldViolation(
                    "--repository",
                    f"{self._where} is pinned to version {_listed(pinned)} of {MODEL}, and {self._who} "
                    f"{wrong}: it reads another repository, or was not told to load what was pinned by hand; "
                    f"give its own, or have it load {MODEL}",
                )
            )

    def check_reach(self) -> None:
        """See `Target`: whether the server is a Triton that loads models when we tell it to."""
        with self._client() as client, self._reaching():
            self._check_server(client)
            try:
                # Changes nothing: it is refused, and for its name if all is well.
                client.load(_NOBODY, ASK_SECONDS)
            except MilongaError as error:
                if type(error) is not MilongaError or _NOBODY not in str(error):
                    raise

    def current_pin(self) -> Pin | None:
        """See `Target`: what the repository has pinned; of two, what the server prefers."""
        _, weights = self._highest()
        return self._registry.pin_of(weights.name, weights.version, weights.digest)

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        """See `Target`. In the same server, beside what serves."""
        if self._challenger == pin:
            return self._address
        self.stop_challenger()
        number = self._number(pin)
        self._repository.add(self._exported(pin, CHALLENGER), number)
        with self._client() as client:
            try:
                client.load(CHALLENGER, seconds)
            except MilongaError as error:
                raise _refused("the challenger does not come up", error) from error
        settle(partial(self._fault, digest_of(pin), "", CHALLENGER), seconds=self._verify)
        self._challenger = pin
        return self._address

    def clip_client(self, address: str, timeout: float) -> TritonClips:
        """See `Target`."""
        return TritonClips(TritonClient(address, tls=self._tls, timeout=timeout), CHALLENGER)

    def stop_challenger(self) -> None:
        """See `Target`. Also one that another promoter left; its memory is free when this returns."""
        self._challenger = None
        end = time.monotonic() + _STOP_SECONDS
        with self._client() as client:
            if _busy(client.versions(CHALLENGER)):
                client.unload(CHALLENGER)
            while _busy(client.versions(CHALLENGER)) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
        self._repository.remove(CHALLENGER)

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """See `Target`: loaded beside what serves, asked, and then pinned alone.

        What fails on the way is taken back. None goes back to weights that are in no registry, as far as it
        is known which version they were.
        """
        end = time.monotonic() + seconds
        before = self._pinned()
        if pin is None:
            served = self.current_pin()
            if served is not None and not self._first:
                raise RolloutError(
                    f"{self._who} serves {shown_pin(served)} now, and what it served before is in no "
                    f"registry; pin its version in {self._where}, and have the server load {MODEL}"
                )
            self._serve(self._first or before[-1:], end)
            return
        number = self._number(pin)
        self._put(pin, number)
        self._first = self._first or before
        try:
            self._serve_beside(before, number, end)
            settle(partial(self._fault, digest_of(pin), str(number)), seconds=self._verify)
            self._serve((number,), end)
        except BaseException:
            # Its own error is less of a help than the first one; who called us sees to it as well.
            with contextlib.suppress(MilongaError):
                self._serve(before, time.monotonic() + _PUT_BACK_SECONDS)
            raise

    def wait(self, pin: Pin, seconds: float) -> None:
        """See `Target`. The old version may still have requests under way: none begins there any more."""
        number, end = self._number(pin), time.monotonic() + seconds
        while True:
            found, failed = f"{self._who} does not answer", False
            with contextlib.suppress(ServiceUnavailableError, DeadlineExceededError):
                states = self._states()
                ready = _ready(states)
                if ready == {number}:
                    return
                state = states.get(number, State(name="", reason=""))
                failed = state.name == "UNAVAILABLE"
                reason = f" ({state.reason or state.name})" if number not in ready else ""
                found = f"{self._who} serves {_listed(ready)}, expected version {number}{reason}"
            if failed or time.monotonic() > end:
                raise RolloutError(found)
            time.sleep(_POLL_SECONDS)

    def verify(self, digest: str) -> None:
        """See `Target`: whoever names no version, and whoever names the pinned one."""
        for version in ("", *map(str, self._pinned())):
            settle(partial(self._fault, digest, version), calls=CALLS, seconds=self._verify)

    def _check_server(self, client: TritonClient) -> None:
        name, _ = client.server()
        if name == "milonga":
            raise InvalidInputError(
                FieldViolation(
                    "--target",
                    f"is triton://{self._address}, where a service of ours answers and no Triton; give "
                    f"--target local --generation-address {self._address}",
                )
            )

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """See whether TLS is why the server does not answer."""
        try:
            yield
        except ServiceUnavailableError:
            check_tls(self._address, self._tls, self._who)
            raise

    def _client(self) -> TritonClient:
        return TritonClient(self._address, tls=self._tls, token=self._token)

    def _fault(self, digest: str, version: str, model: str = MODEL) -> str:
        """What is wrong with the answer of a version, or nothing."""
        named = f"version {version} of {model}" if version else model
        return wrong_answer(partial(self._ask, version, model), digest, f"{named} of {self._who}")

    def _ask(self, version: str, model: str = MODEL) -> ModelVersion:
        with TritonClient(self._address, tls=self._tls, timeout=ASK_SECONDS, own_connection=True) as client:
            return client.version_of_clip(model, version)

    def _states(self) -> dict[int, State]:
        with self._client() as client:
            return client.versions(MODEL)

    def _serve(self, versions: Collection[int], end: float) -> None:
        """Pin `versions`, and have the server load them, and no others. Raises `RolloutError`."""
        self._repository.pin(MODEL, *versions)
        with self._client() as client:
            try:
                client.load(MODEL, max(1.0, end - time.monotonic()))
            except MilongaError as error:
                raise _refused(f"version {_listed(versions)} of {MODEL} can't be served", error) from error

    def _serve_beside(self, before: Collection[int], number: int, end: float) -> None:
        """Serve a version beside those that serve. These may be broken, or gone."""
        there = {*before} & {*self._repository.versions(MODEL)}
        try:
            self._serve({*there, number}, end)
        except RolloutError:
            if number not in _ready(self._states()) or there <= {number}:
                raise

    def _put(self, pin: Pin, number: int) -> None:
        """See that the repository has the weights of `pin`, under its name, as version `number`."""
        if number in self._repository.versions(MODEL):
            (weights,) = self._repository.weights(MODEL, number).values()
            if not pin.startswith("models:") or weights == _weights_of(pin):
                return
        self._repository.add(self._exported(pin, MODEL), number)

    def _exported(self, pin: Pin, model: str) -> Exported:
        """The weights of `pin` under the configuration and the code that serve."""
        uri = ModelURI.parse(pin)
        if uri.scheme == "models":
            # Into the cache, where `resolve` finds it: that would ask the registry of MLFLOW_TRACKING_URI.
            fetch(uri.path, pin=uri.digest, uri=self._registry.uri)
        model_found = resolve(uri)
        found = model_found.identity
        highest, _ = self._highest()
        (part,) = self._repository.weights(MODEL, highest)
        weights = Weights(
            name=found.name, version=found.version, digest=found.digest, folder=model_found.folder
        )
        code = self._repository.code(MODEL, highest)
        return Exported(config=self._config(model), code=code, weights={part: weights})

    def _number(self, pin: Pin) -> int:
        """The version folder of `pin`. Raises `InvalidInputError` where other weights have its number."""
        there = {
            number: weights.digest
            for number in self._repository.versions(MODEL)
            for weights in self._repository.weights(MODEL, number).values()
        }
        digest = digest_of(pin)
        if not pin.startswith("models:"):
            return next((number for number, one in there.items() if one == digest), 1)
        number = int(version_of(pin))
        if there.get(number, digest) != digest:
            raise InvalidInputError(
                FieldViolation(
                    "--repository",
                    f"{self._where} has other weights ({there[number]}) as version {number} of {MODEL} than "
                    f"{shown_pin(pin)}; register that again, which gives it a number of its own",
                )
            )
        return number

    def _config(self, model: str) -> ModelConfig:
        """The configuration that serves, under the name of `model`, without the pin."""
        found = self._repository.config(MODEL)
        if found is None:
            raise self._no_model()
        found.name = model
        found.ClearField("version_policy")
        return found

    def _pinned(self) -> tuple[int, ...]:
        pinned = self._repository.pinned(MODEL)
        if not pinned:
            raise self._no_model()
        return pinned

    def _highest(self) -> tuple[int, Weights]:
        """The highest pinned version, which gets the requests that name none, and its weights."""
        highest = self._pinned()[-1]
        (weights,) = self._repository.weights(MODEL, highest).values()
        return highest, weights

    def _no_model(self) -> InvalidInputError:
        return InvalidInputError(
            FieldViolation(
                "--repository",
                f"{self._where} has no {MODEL} with a pinned version; `milonga triton export` writes one, or "
                "give the repository that the server reads",
            )
        )


def _weights_of(pin: Pin) -> Weights:
    """What `ModelRepository.weights` says of a registered version."""
    name = pin.removeprefix("models:/").rpartition("/")[0]
    return Weights(name=name, version=version_of(pin), digest=digest_of(pin))


def _refused(what: str, error: MilongaError) -> MilongaError:
    """`error`, as a rollout's where the server refuses, or is too slow."""
    if type(error) is MilongaError or isinstance(error, DeadlineExceededError):
        return RolloutError(f"{what}: {error}")
    return error


def _ready(states: dict[int, State]) -> set[int]:
    return {number for number, state in states.items() if state.name == "READY"}


def _busy(states: dict[int, State]) -> bool:
    """Whether something is loaded, or on its way."""
    return any(state.name in ("READY", "LOADING", "UNLOADING") for state in states.values())


def _listed(versions: Collection[int]) -> str:
    return ", ".join(map(str, sorted(versions))) or "nothing"
