"""Promotion into a Triton server: new weights are loaded alongside the old ones, verified, then served alone.

The pin is the version_policy of ``tango/config.pbtxt`` in the server's model repository. The server must run
in explicit mode (``--model-control-mode=explicit``). The challenger is another model there, with the same
configuration and code.
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
    InvalidInputError,
    MilongaError,
    ServiceUnavailableError,
    invalid,
)
from services.inference.triton.repository import ModelExport, ModelRepository, Weights
from services.weights.uri import ResolvedModel, resolve
from training.promotion.errors import RolloutError
from training.promotion.registry import Registry
from training.promotion.target import Pin, pinned_digest, shown_pin, version_of
from training.promotion.targets.locks import FileLock, file_lock
from training.promotion.targets.probing import CALLS, VERIFY_SECONDS, check_tls, place_of, poll_until, probe
from training.promotion.targets.triton_client import State, TritonClient, TritonClips

MODEL: Final = "tango"
CHALLENGER: Final = "tango-challenger"
"""Name of the model without traffic."""
DEFAULT_PORT: Final = 8001
PROBE_SECONDS: Final = 120.0
"""Time for the clip of one step that shows the weights: it queues among the callers' requests."""

_RESTORE_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.25
_NO_MODEL: Final = "milonga-no-such-model"


class TritonTarget:
    """The model `tango` of one Triton server. Implements `Target`."""

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
        """Make no call yet.

        Args:
            address: HOST:PORT of the server's gRPC endpoint; without a port `DEFAULT_PORT`.
            repository: the server's model repository.
            registry: registry of the versions.
            tls: TLS settings; None: plaintext.
            token: operator token, where loading is restricted (`triton_client.RESTRICTION`).
            verify_seconds: see `VERIFY_SECONDS`.
        """
        port = address.rpartition("]")[2]  # the colons before are of an IPv6 address
        self._address = address if ":" in port else f"{address}:{DEFAULT_PORT}"
        self._server, self._where = f"the Triton at {self._address}", repository.storage.place
        self._repository, self._registry, self._tls, self._token = repository, registry, tls, token
        self._verify = verify_seconds
        self._challenger: Pin | None = None
        self._models: dict[Pin, ResolvedModel] = {}
        """Versions that were resolved: challenger and rollout take the same files, hashed once."""
        self._first: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """See `Target`: the address; a loopback address is replaced by the name of this machine."""
        return place_of("triton", self._address)

    @property
    def serving(self) -> str:
        """See `Target`: the server with its version, and a digest of the model's configuration."""
        with self._client() as client:
            name, version = client.server()
        config = self._config(CHALLENGER).SerializeToString(deterministic=True)
        return f"{self.place} {name} {version} {hashlib.sha256(config).hexdigest()[:16]}"

    def lock(self) -> AbstractContextManager[FileLock]:
        """See `Target`. All promoters of one server must run on one machine."""
        return file_lock(self.place)

    @property
    def idle(self) -> bool:
        """See `Target`."""
        return False

    def check_setup(self, *, challenger: bool) -> None:
        """See `Target`: whether the repository is the server's. Not checked where nothing is served."""
        pinned = set(self._pinned())
        with self._client() as client, self._checking_tls():
            self._check_server(client)
            states = client.versions(MODEL)
        ready = _ready(states)
        wrong = f"serves {_listed(ready)}" if ready and ready != pinned else ""
        if not states:
            wrong = f"does not know {MODEL}"
        if not wrong and ready:
            (highest, weights) = self._highest()
            with contextlib.suppress(MilongaError):  # broken, which may be why a rollback is wanted
                found = self._query("").digest
                wrong = f"serves {found}" if found != weights.digest else ""
                pinned = {highest}
        if wrong:
            raise invalid(
                "--repository",
                f"{self._where} is pinned to version {_listed(pinned)} of {MODEL}, and {self._server} "
                f"{wrong}: it reads another repository, or has not loaded a pin set by hand; give the "
                f"server's repository, or have it load {MODEL}",
            )

    def check_reach(self) -> None:
        """See `Target`: whether the server is a Triton that lets the caller load models."""
        with self._client() as client, self._checking_tls():
            self._check_server(client)
            try:
                # Changes nothing: there is no such model, which is the error where loading is allowed.
                client.load(_NO_MODEL, PROBE_SECONDS)
            except MilongaError as error:
                if type(error) is not MilongaError or _NO_MODEL not in str(error):
                    raise

    def current_pin(self) -> Pin | None:
        """See `Target`: the version that the repository pins; of two the higher, which the server prefers."""
        _, weights = self._highest()
        return self._registry.pin_of(weights.name, weights.version, weights.digest)

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        """See `Target`. The challenger is loaded into the same server."""
        if self._challenger == pin:
            return self._address
        self.stop_challenger()
        number = self._number(pin)
        self._repository.add(self._exported(pin, CHALLENGER), number)
        with self._client() as client:
            try:
                client.load(CHALLENGER, seconds)
            except MilongaError as error:
                raise _refused("the challenger failed", error) from error
        poll_until(partial(self._fault, pinned_digest(pin), "", CHALLENGER), seconds=self._verify)
        self._challenger = pin
        return self._address

    def clip_client(self, address: str, timeout: float) -> TritonClips:
        """See `Target`."""
        return TritonClips(TritonClient(address, tls=self._tls, timeout=timeout), CHALLENGER)

    def stop_challenger(self) -> None:
        """See `Target`. Also of another promoter. Returns when its memory is free."""
        self._challenger = None
        end = time.monotonic() + _STOP_SECONDS
        with self._client() as client:
            if _busy(client.versions(CHALLENGER)):
                client.unload(CHALLENGER)
            while _busy(client.versions(CHALLENGER)) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
        self._repository.remove(CHALLENGER)

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """See `Target`: the version is loaded alongside the served one, probed, and then pinned alone.

        After a failure the old pin is loaded again. None restores weights that are in no registry, if this
        promotion has replaced them.
        """
        end = time.monotonic() + seconds
        before = self._pinned()
        if pin is None:
            served = self.current_pin()
            if served is not None and not self._first:
                raise RolloutError(
                    f"{self._server} serves {shown_pin(served)} now, and what it served before is in no "
                    f"registry; pin its version in {self._where}, and have the server load {MODEL}"
                )
            self._serve(self._first or before[-1:], end)
            return
        number = self._number(pin)
        self._put(pin, number)
        self._first = self._first or before
        try:
            self._serve_alongside(before, number, end)
            poll_until(partial(self._fault, pinned_digest(pin), str(number)), seconds=self._verify)
            self._serve((number,), end)
        except BaseException:
            # The first error matters; the caller restores the pin as well.
            with contextlib.suppress(MilongaError):
                self._serve(before, time.monotonic() + _RESTORE_SECONDS)
            raise

    def wait(self, pin: Pin, seconds: float) -> None:
        """See `Target`. The old version gets no new requests, but may still have running ones."""
        number, end = self._number(pin), time.monotonic() + seconds
        while True:
            found, failed = f"{self._server} does not answer", False
            with contextlib.suppress(ServiceUnavailableError, DeadlineExceededError):
                states = self._states()
                ready = _ready(states)
                if ready == {number}:
                    return
                state = states.get(number, State(name="", reason=""))
                failed = state.name == "UNAVAILABLE"
                reason = f" ({state.reason or state.name})" if number not in ready else ""
                found = f"{self._server} serves {_listed(ready)}, expected version {number}{reason}"
            if failed or time.monotonic() > end:
                raise RolloutError(found)
            time.sleep(_POLL_SECONDS)

    def verify(self, digest: str) -> None:
        """See `Target`: requests without a version, and requests of the pinned one."""
        for version in ("", *map(str, self._pinned())):
            poll_until(partial(self._fault, digest, version), calls=CALLS, seconds=self._verify)

    def _check_server(self, client: TritonClient) -> None:
        name, _ = client.server()
        if name == "milonga":
            raise invalid(
                "--target",
                f"is triton://{self._address}, which is a service of Milonga and no Triton; give "
                f"--target local --generation-address {self._address}",
            )

    @contextlib.contextmanager
    def _checking_tls(self) -> Iterator[None]:
        """Check whether TLS is why a call inside fails. Raises `InvalidInputError` if it is."""
        try:
            yield
        except ServiceUnavailableError:
            check_tls(self._address, self._tls, self._server)
            raise

    def _client(self) -> TritonClient:
        return TritonClient(self._address, tls=self._tls, token=self._token)

    def _fault(self, digest: str, version: str, model: str = MODEL) -> str:
        """Return the fault of a version's answer; an empty text if there is none."""
        name = f"version {version} of {model}" if version else model
        return probe(partial(self._query, version, model), digest, f"{name} of {self._server}")

    def _query(self, version: str, model: str = MODEL) -> ModelVersion:
        with TritonClient(self._address, tls=self._tls, timeout=PROBE_SECONDS, own_connection=True) as client:
            return client.version_of_clip(model, version)

    def _states(self) -> dict[int, State]:
        with self._client() as client:
            return client.versions(MODEL)

    def _serve(self, versions: Collection[int], end: float) -> None:
        """Pin `versions`, and have the server load exactly these. Raises `RolloutError`."""
        self._repository.pin(MODEL, *versions)
        with self._client() as client:
            try:
                client.load(MODEL, max(1.0, end - time.monotonic()))
            except MilongaError as error:
                raise _refused(f"version {_listed(versions)} of {MODEL} can't be served", error) from error

    def _serve_alongside(self, before: Collection[int], number: int, end: float) -> None:
        """Serve a version in addition to those of `before`, which may be broken or missing."""
        existing = {*before} & {*self._repository.versions(MODEL)}
        try:
            self._serve({*existing, number}, end)
        except RolloutError:
            if number not in _ready(self._states()) or existing <= {number}:
                raise

    def _put(self, pin: Pin, number: int) -> None:
        """Add the weights of `pin` to the repository as version `number`, unless they are there."""
        if number in self._repository.versions(MODEL):
            (weights,) = self._repository.weights(MODEL, number).values()
            if not pin.startswith("models:") or weights == _weights_of(pin):
                return
        self._repository.add(self._exported(pin, MODEL), number)

    def _exported(self, pin: Pin, model: str) -> ModelExport:
        """Return the weights of `pin` with the served configuration and code."""
        if pin not in self._models:
            self._models[pin] = resolve(pin, tracking_uri=self._registry.uri)
        found = self._models[pin]
        highest, _ = self._highest()
        (part,) = self._repository.weights(MODEL, highest)
        weights = Weights(
            name=found.identity.name,
            version=found.identity.version,
            digest=found.digest,
            folder=found.own_folder,
        )
        code = self._repository.code(MODEL, highest)
        return ModelExport(config=self._config(model), code=code, weights={part: weights})

    def _number(self, pin: Pin) -> int:
        """Return the version number of `pin`. Raises `InvalidInputError` if other weights have it."""
        digests = {
            number: weights.digest
            for number in self._repository.versions(MODEL)
            for weights in self._repository.weights(MODEL, number).values()
        }
        digest = pinned_digest(pin)
        if not pin.startswith("models:"):
            return next((number for number, one in digests.items() if one == digest), 1)
        number = int(version_of(pin))
        if digests.get(number, digest) != digest:
            raise invalid(
                "--repository",
                f"{self._where} has other weights ({digests[number]}) as version {number} of {MODEL} "
                f"than {shown_pin(pin)}; register the model again, which gives it a new number",
            )
        return number

    def _config(self, model: str) -> ModelConfig:
        """Return the served configuration, renamed to `model`, without the pin."""
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
        """Return the highest pinned version, which gets requests without a version, and its weights."""
        highest = self._pinned()[-1]
        (weights,) = self._repository.weights(MODEL, highest).values()
        return highest, weights

    def _no_model(self) -> InvalidInputError:
        return invalid(
            "--repository",
            f"{self._where} has no {MODEL} with a pinned version; `milonga triton export` writes one, or "
            "give the repository that the server reads",
        )


def _weights_of(pin: Pin) -> Weights:
    """Return the entry of `ModelRepository.weights` for a registered version."""
    name = pin.removeprefix("models:/").rpartition("/")[0]
    return Weights(name=name, version=version_of(pin), digest=pinned_digest(pin))


def _refused(what: str, error: MilongaError) -> MilongaError:
    """Return `error`, as a `RolloutError` if the server refused or was too slow."""
    if type(error) is MilongaError or isinstance(error, DeadlineExceededError):
        return RolloutError(f"{what}: {error}")
    return error


def _ready(states: dict[int, State]) -> set[int]:
    return {number for number, state in states.items() if state.name == "READY"}


def _busy(states: dict[int, State]) -> bool:
    """Return whether a version is loaded, being loaded or being unloaded."""
    return any(state.name in ("READY", "LOADING", "UNLOADING") for state in states.values())


def _listed(versions: Collection[int]) -> str:
    return ", ".join(map(str, sorted(versions))) or "nothing"
