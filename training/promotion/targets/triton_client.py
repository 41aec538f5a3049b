"""A Triton server by the Open Inference Protocol: which versions it has, loading them, and clips of them.

One call of ModelStreamInfer is one clip; tritonclient has one stream a client, so its messages are used here
without its client.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, Unpack

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from services.api.generation import Clip, Generation, GenerationOptions, Timings
from services.api.model import ModelVersion
from services.client import TLS
from services.client.connection import Connection
from services.errors import (
    DeadlineExceededError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    RequestCancelledError,
    ServiceUnavailableError,
    UnauthenticatedError,
)

CALL_SECONDS: Final = 10.0
"""For an answer that needs no model."""
RESTRICTION: Final = "milonga-operator"
"""Key of a ``--grpc-restricted-protocol`` that an operator's token opens."""

_DATATYPES: Final[Mapping[str, tuple[type[Any], str]]] = {
    "SEED": (np.int64, "INT64"),
    "NUM_INFERENCE_STEPS": (np.int32, "INT32"),
    "GUIDANCE_SCALE": (np.float32, "FP32"),
    "DURATION": (np.float32, "FP32"),
}
_FIELD: Final = re.compile(r"(?P<field>[a-z_]+(?:\[\d+\])?): (?P<description>.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """How a version stands."""

    name: str
    """READY, LOADING, UNLOADING, UNAVAILABLE, or empty: never loaded."""
    reason: str
    """Why, in Triton's words."""


class TritonClient:
    """One connection to a Triton server.

    Raises:
        ServiceUnavailableError: it does not answer, or is no Triton.
        UnauthenticatedError: it wants a token, or another one.
        DeadlineExceededError: it answers too late.
        InvalidInputError: it does not load models on request; or, of a clip, a value was refused.
        MilongaError: it refuses, or fails; in its words.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: TLS | None = None,
        token: str = "",
        timeout: float = CALL_SECONDS,
        own_connection: bool = False,
    ) -> None:
        """Nothing is called yet.

        Args:
            address: HOST:PORT of its gRPC endpoint.
            tls: how it is spoken to.
            token: of its operators; empty: none.
            timeout: seconds that a clip may take.
            own_connection: share none with other clients of this process.
        """
        options = (("grpc.use_local_subchannel_pool", 1),) if own_connection else ()
        connection = Connection({"target": address}, tls=tls, channel_options=options)
        self.address, self._timeout = address, timeout
        self._metadata: tuple[tuple[str, str], ...] = ()
        if token:
            connection.metadata_for(address, token)  # refuses one that would travel in plaintext
            self._metadata = ((f"triton-grpc-protocol-{RESTRICTION}", token),)
        self._channel = connection.open_channel(address)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way, and the connection."""
        self._channel.close()

    def server(self) -> tuple[str, str]:
        """Name and version of the server."""
        found = self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest())
        return found.name, found.version

    def versions(self, model: str) -> dict[int, State]:
        """The versions of a model that the server knows of; none where it does not know the model."""
        found = self._call(self._stub.RepositoryIndex, pb.RepositoryIndexRequest())
        return {
            int(one.version): State(name=one.state, reason=_one_line(one.reason))
            for one in found.models
            if one.name == model and one.version.isdecimal()
        }

    def load(self, model: str, seconds: float) -> None:
        """Load the versions that the repository's configuration names, and no others."""
        self._call(
            self._stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name=model), seconds=seconds
        )

    def unload(self, model: str) -> None:
        """Unload a model, if it is loaded: once what is under way is answered."""
        self._call(self._stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name=model))

    def version_of_clip(self, model: str, version: str = "") -> ModelVersion:
        """Return which weights make a clip just now, by one of one step. Without a version Triton chooses."""
        return self._clip(model, version, "a dog barks", {"num_inference_steps": 1, "seed": 1}).model

    def clip(self, model: str, prompt: str, options: GenerationOptions) -> Generation:
        """Make the clip of a prompt. The total time is measured here, since Triton states none."""
        return self._clip(model, "", prompt, options)

    def _clip(self, model: str, version: str, prompt: str, options: GenerationOptions) -> Generation:
        begun = time.monotonic()
        request = pb.ModelInferRequest(model_name=model, model_version=version)
        _add_text(request, "PROMPT", prompt)
        if (scheduler := options.get("scheduler")) is not None:
            _add_text(request, "SCHEDULER", scheduler)
        for name, (kind, datatype) in _DATATYPES.items():
            if (value := options.get(name.lower())) is not None:
                request.inputs.add(name=name, datatype=datatype, shape=[1])
                request.raw_input_contents.append(np.array([value], dtype=kind).tobytes())
        for name in ("AUDIO", "SAMPLE_RATE", "DIGEST"):  # without PROGRESS, which would come at each step
            request.outputs.add(name=name)
        with self._errors():
            answers = list(self._stub.ModelStreamInfer(iter([request]), timeout=self._timeout))
        for made in answers:
            if made.error_message:
                raise _refusal(made.error_message)
            if (answer := _read(made.infer_response)) is not None:
                clip, weights = answer
                total = time.monotonic() - begun
                return Generation(
                    clips=(clip.encoded(options.get("encoding") or clip.encoding, clip.sampling_rate),),
                    seed=clip.seed,
                    model=weights,
                    warnings=(),
                    timings=Timings(queued=0.0, encode=0.0, denoise=0.0, decode=0.0, total=total),
                )
        raise MilongaError(f"{self.address} ended the stream of {model} without a clip")

    def _call(self, method: Callable[..., Any], request: Any, *, seconds: float = CALL_SECONDS) -> Any:
        with self._errors():
            return method(request, timeout=seconds, metadata=self._metadata)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._named(error.code(), _one_line(error.details())) from error
        except ValueError as error:  # gRPC's, of a channel that another thread has closed
            raise RequestCancelledError(f"{self.address}: {error}") from error

    def _named(self, code: grpc.StatusCode, details: str) -> MilongaError:
        told = f"the Triton at {self.address}: {details}"
        match code:
            case grpc.StatusCode.UNAVAILABLE if "explicit model load" in details:
                return InvalidInputError(
                    FieldViolation(
                        f"the Triton at {self.address}",
                        f"refuses to load models ({details}); start it with --model-control-mode=explicit",
                    )
                )
            case grpc.StatusCode.UNAVAILABLE if "is restricted" in details:
                return UnauthenticatedError(
                    f"{told}; give its token (--operator-token-file); it must be started with "
                    f"--grpc-restricted-protocol=model-repository:{RESTRICTION}=TOKEN"
                )
            case grpc.StatusCode.UNAVAILABLE:
                return ServiceUnavailableError(told)
            case grpc.StatusCode.UNIMPLEMENTED:
                return ServiceUnavailableError(f"{self.address} is no Triton: {details}")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineExceededError(told)
            case grpc.StatusCode.CANCELLED:
                return RequestCancelledError(told)
            case _:
                return MilongaError(told)


class TritonClips:
    """A `ClipMaker` on a model of a Triton server."""

    def __init__(self, client: TritonClient, model: str) -> None:
        """Take over `client`: closing this closes it."""
        self._client, self._model = client, model

    def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> Generation:
        """See `ClipMaker`. Makes one clip."""
        return self._client.clip(self._model, prompt, options)

    def close(self) -> None:
        """See `ClipMaker`."""
        self._client.close()


def _add_text(request: Any, name: str, text: str) -> None:
    data = text.encode()
    request.inputs.add(name=name, datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(data).to_bytes(4, "little") + data)


def _read(response: Any) -> tuple[Clip, ModelVersion] | None:
    """Return the clip that an answer holds, and its weights; None where it holds none."""
    contents: dict[str, bytes] = {
        output.name: data for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    if "AUDIO" not in contents:
        return None
    if missing := {"SAMPLE_RATE", "DIGEST"} - contents.keys():
        raise MilongaError(f"the model {response.model_name} gives no {', '.join(sorted(missing))}")
    clip = Clip.of_samples(
        np.frombuffer(contents["AUDIO"], dtype="<f4"),
        int(np.frombuffer(contents["SAMPLE_RATE"], dtype="<i4")[0]),
    )
    digest = contents["DIGEST"][4:].decode()  # BYTES: their length comes first
    version = ModelVersion(
        name=response.model_name, version=response.model_version, digest=digest, license=""
    )
    return clip, version


def _refusal(message: str) -> MilongaError:
    """An error within a stream, which has no status: a field's name comes first where a value is wrong."""
    if found := _FIELD.fullmatch(message):
        return InvalidInputError(FieldViolation(found["field"], found["description"]))
    return MilongaError(_one_line(message))


def _one_line(text: Any) -> str:
    """What the Python backend says, without where in the code that was."""
    return " ".join(str(text or "").partition("\n\nAt:\n")[0].split())
