"""Client of a Triton server by the Open Inference Protocol: its versions, loading them, and clips.

One call of ModelStreamInfer makes one clip. A client of tritonclient has only one stream, so only its
messages are used here.
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
    MilongaError,
    RequestCancelledError,
    ServiceUnavailableError,
    UnauthenticatedError,
    invalid,
)

CALL_SECONDS: Final = 10.0
"""Timeout of calls that run no model."""
RESTRICTION: Final = "milonga-operator"
"""Key of ``--grpc-restricted-protocol``, whose value is the operator token."""

_DATATYPES: Final[Mapping[str, tuple[type[Any], str]]] = {
    "SEED": (np.int64, "INT64"),
    "NUM_INFERENCE_STEPS": (np.int32, "INT32"),
    "GUIDANCE_SCALE": (np.float32, "FP32"),
    "DURATION": (np.float32, "FP32"),
}
_FIELD: Final = re.compile(r"(?P<field>[a-z_]+(?:\[\d+\])?): (?P<description>.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """State of a version in Triton."""

    name: str
    """READY, LOADING, UNLOADING or UNAVAILABLE; empty if it was never loaded."""
    reason: str
    """Triton's message."""


class TritonClient:
    """One connection to a Triton server.

    Raises:
        ServiceUnavailableError: the server does not answer, or is no Triton.
        UnauthenticatedError: the token is missing or wrong.
        DeadlineExceededError: the answer takes too long.
        InvalidInputError: the server is not in explicit mode, or refuses a value of a clip.
        MilongaError: the server refuses, or fails; with its message.
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
        """Make no call yet.

        Args:
            address: HOST:PORT of its gRPC endpoint.
            tls: TLS settings; None: plaintext.
            token: operator token; empty: none.
            timeout: seconds per clip.
            own_connection: don't share a connection with other clients of this process.
        """
        options = (("grpc.use_local_subchannel_pool", 1),) if own_connection else ()
        connection = Connection({"target": address}, tls=tls, token="", channel_options=options)
        self.address, self._timeout = address, timeout
        self._metadata: tuple[tuple[str, str], ...] = ()
        if token:
            connection.metadata_for(address, token)  # raises where the token would travel in plaintext
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
        """Cancel running calls, and close the connection."""
        self._channel.close()

    def server(self) -> tuple[str, str]:
        """Return name and version of the server."""
        found = self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest())
        return found.name, found.version

    def versions(self, model: str) -> dict[int, State]:
        """Return the versions of a model by number; none where the server does not know the model."""
        found = self._call(self._stub.RepositoryIndex, pb.RepositoryIndexRequest())
        return {
            int(one.version): State(name=one.state, reason=_one_line(one.reason))
            for one in found.models
            if one.name == model and one.version.isdecimal()
        }

    def load(self, model: str, seconds: float) -> None:
        """Load exactly the versions that the repository's configuration names."""
        self._call(
            self._stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name=model), seconds=seconds
        )

    def unload(self, model: str) -> None:
        """Unload a model, if it is loaded, after its running requests."""
        self._call(self._stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name=model))

    def version_of_clip(self, model: str, version: str = "") -> ModelVersion:
        """Return the weights that answer, by a clip of one step. Without a version the server chooses one."""
        return self._clip(model, version, "a dog barks", {"num_inference_steps": 1, "seed": 1}).model

    def clip(self, model: str, prompt: str, options: GenerationOptions) -> Generation:
        """Return the clip of a prompt. The total time is measured here, since Triton reports none."""
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
        for name in ("AUDIO", "SAMPLE_RATE", "DIGEST"):  # without PROGRESS, an answer per step
            request.outputs.add(name=name)
        with self._errors():
            answers = list(self._stub.ModelStreamInfer(iter([request]), timeout=self._timeout))
        for one in answers:
            if one.error_message:
                raise _refusal(one.error_message)
            if (answer := _read(one.infer_response)) is not None:
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
        message = f"the Triton at {self.address}: {details}"
        match code:
            case grpc.StatusCode.UNAVAILABLE if "explicit model load" in details:
                return invalid(
                    f"the Triton at {self.address}",
                    f"refuses to load models ({details}); start it with --model-control-mode=explicit",
                )
            case grpc.StatusCode.UNAVAILABLE if "is restricted" in details:
                return UnauthenticatedError(
                    f"{message}; give the token (--operator-token-file) with which it was started: "
                    f"--grpc-restricted-protocol=model-repository:{RESTRICTION}=TOKEN"
                )
            case grpc.StatusCode.UNAVAILABLE:
                return ServiceUnavailableError(message)
            case grpc.StatusCode.UNIMPLEMENTED:
                return ServiceUnavailableError(f"{self.address} is no Triton: {details}")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineExceededError(message)
            case grpc.StatusCode.CANCELLED:
                return RequestCancelledError(message)
            case _:
                return MilongaError(message)


class TritonClips:
    """A `ClipMaker` on a model of a Triton server."""

    def __init__(self, client: TritonClient, model: str) -> None:
        """`close` also closes `client`."""
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
    """Return the clip that an answer holds, and its weights; None if it holds none."""
    contents: dict[str, bytes] = {
        output.name: data for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    if "AUDIO" not in contents:
        return None
    if missing := {"SAMPLE_RATE", "DIGEST"} - contents.keys():
        raise MilongaError(f"the model {response.model_name} returns no {', '.join(sorted(missing))}")
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
    """Return the error of a stream's message, which has no status; for a wrong value it names the field."""
    if found := _FIELD.fullmatch(message):
        return invalid(found["field"], found["description"])
    return MilongaError(_one_line(message))


def _one_line(text: Any) -> str:
    """Return the message of the Python backend, without its traceback."""
    return " ".join(str(text or "").partition("\n\nAt:\n")[0].split())
