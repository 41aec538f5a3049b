"""The Python client of a generation service: `AudioClient`, and `AsyncAudioClient` for asyncio.

::

    with AudioClient("localhost:50051") as client:
        generation = client.generate("A dog barks then a siren wails", seed=7)
        Path("clip.wav").write_bytes(generation.clips[0].audio)

Needs the light base install only: no torch. Both faces share the building of requests, the reading of answers
and the errors, which are those of `services.errors`. Shapes: N samples.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
import grpc.aio
import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from milonga.v1 import generation_pb2 as pb
from milonga.v1 import generation_pb2_grpc as rpc
from milonga.v1 import model_pb2
from services.errors import (
    DeadlineExceededError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ServiceUnavailableError,
)
from services.runtime import audio, status
from services.runtime.tls import read_authorities, read_identity

DEFAULT_TIMEOUT_SECONDS = 600.0
MAX_RESPONSE_BYTES = 256 * 2**20
"""Largest answer that the client takes: twenty minutes of float32 sound at 48 kHz."""

_KEEPALIVE_MILLISECONDS = 60_000
_MAX_ATTEMPTS = 5  # gRPC's own ceiling


class GenerationOptions(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt. None, or left out: the service's default."""

    negative_prompt: str | None
    """What not to hear."""
    duration: float | None
    """Seconds of each clip."""
    clip_count: int | None
    """Different clips of the prompt."""
    seed: int | None
    """0 to 2**64 - 1; without it the service draws one and says which."""
    num_inference_steps: int | None
    """Denoising steps."""
    guidance_scale: float | None
    """Classifier-free guidance; up to 1 means none."""
    scheduler: str | None
    """Name of a scheduler."""
    encoding: str | None
    """wav, flac, ogg, linear16 or float32."""
    sampling_rate: int | None
    """Hertz."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TLS:
    """Files of a TLS connection, in PEM. All None: the system's authorities, no client certificate."""

    ca_file: Path | None = None
    """Authorities that the server's certificate is checked against."""
    cert_file: Path | None = None
    """The client's certificate chain, for mTLS; together with `key_file`."""
    key_file: Path | None = None
    """The client's private key."""
    server_name: str | None = None
    """Name that the server's certificate must carry, where it is not the target's."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidInputError(
                FieldViolation(
                    "tls", "has only one of cert_file and key_file; give both for mTLS, or neither"
                )
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """Immutable identity of the weights that made a clip."""

    name: str
    version: str
    digest: str
    """`sha256:` and hexadecimal digits."""
    license: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds by stage."""

    queued: float
    encode: float
    denoise: float
    decode: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The request waits; `position` clips stand before it."""

    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A denoising step is done."""

    clip_index: int
    step: int
    num_inference_steps: int
    fraction: float
    """Share of the whole request, 0 to 1."""
    seconds_left: float | None
    """Estimate to the end of the request; None while it can't be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """How a clip looks so far."""

    clip_index: int
    step: int
    mel_TM: NDArray[np.uint8]
    """[frames, mel bins], 0 silence (ln 1e-5) to 255 loudest (ln 10), linear in the natural logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip, encoded."""

    audio: bytes = field(repr=False)
    encoding: str
    sampling_rate: int
    duration: float
    """Seconds."""
    index: int
    seed: int

    def waveform(self) -> NDArray[np.float32]:
        """[N] decoded samples in [-1, 1]."""
        return audio.decode_audio(self.audio, self.encoding, self.sampling_rate)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The last event of a stream."""

    model: ModelVersion
    warnings: tuple[str, ...]
    timings: Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The answer to one prompt."""

    clips: tuple[Clip, ...]
    seed: int
    """Given, or drawn by the service."""
    model: ModelVersion
    warnings: tuple[str, ...]
    timings: Timings


Update = Queued | Progress | Preview | Clip | Finished
"""What `stream` yields: `Queued` and `Progress` events, each `Clip` as it is done, one `Finished` last."""


MAX_TEXT_BYTES = 2**18
"""Longest prompt that is sent at all, in UTF-8. Services accept far less, and say how much."""


def build_request(prompt: str, **options: Unpack[GenerationOptions]) -> pb.GenerateAudioRequest:
    """Return the message of a prompt and options.

    Raises:
        InvalidInputError: what the wire can't carry (NaN seconds, a negative seed, an unknown encoding, a
            prompt of megabytes), all at once. Limits are the service's to judge.
    """
    given = {name: value for name, value in options.items() if value is not None}
    seconds, encoding = given.pop("duration", None), given.pop("encoding", None)
    if "sampling_rate" in given:
        given["sample_rate_hertz"] = given.pop("sampling_rate")
    request = pb.GenerateAudioRequest()
    faults: list[FieldViolation] = []
    for name, value in {"prompt": prompt, **given}.items():
        if name not in request.DESCRIPTOR.fields_by_name:
            raise TypeError(f"there is no generation option {name!r}")
        try:
            setattr(request, name, value)
        except (ValueError, TypeError) as error:
            faults.append(
                FieldViolation(name, f"is {str(value)[:40]!r}, which the wire can't carry: {error}")
            )
    if isinstance(seconds, int | float):
        faults.extend(_set_duration(request.duration, seconds))
    if isinstance(encoding, str) and encoding not in audio.ENCODINGS:
        faults.append(
            FieldViolation("encoding", f"is {encoding!r}, must be one of {', '.join(audio.ENCODINGS)}")
        )
    elif isinstance(encoding, str):
        request.encoding = audio.ENCODINGS[encoding]
    for name in ("prompt", "negative_prompt"):
        size = len(getattr(request, name).encode())
        if size > MAX_TEXT_BYTES:
            # A larger message is refused by the transport, before the service could say why.
            faults.append(FieldViolation(name, f"is {size} bytes long, must be {MAX_TEXT_BYTES} at most"))
    if faults:
        raise InvalidInputError(*faults)
    return request


class ConnectionOptions(TypedDict, total=False):
    """How to reach a service; every field has a default."""

    tls: TLS | None
    """Speak TLS. None: plaintext."""
    token: str | None
    """Sent as ``authorization: Bearer TOKEN``, for a gateway that asks for one. Needs `tls`."""
    timeout: float
    """Seconds that a call may take, where the call says nothing else. Default 600."""
    retries: int
    """How often a call that met UNAVAILABLE is tried again, 0 to 4, with exponential backoff. Default 3."""
    max_response_bytes: int
    """Largest answer to take. Default 256 MiB."""


class AudioClient:
    """Calls a generation service. Thread-safe: make one and keep it; close it, or use it as a context.

    Every method raises the tree of `services.errors`: `InvalidInputError` with every violated field,
    `QueueFullError` with `retry_after`, `DeadlineExceededError`, `ServiceUnavailableError`; and plain
    `MilongaError` for a fault of the service.
    """

    def __init__(self, target: str, **options: Unpack[ConnectionOptions]) -> None:
        """Nothing is sent yet: the channel connects at the first call.

        Args:
            target: ``host:port``, or any gRPC name (``dns:///generation:50051``, ``unix:/run/milonga.sock``).
                Of several addresses, calls go round.
            options: see `ConnectionOptions`.

        Raises:
            InvalidInputError: a token without TLS, retries out of range, a TLS file that can't be read.
        """
        self._connection = _Connection(target, **options)
        self._channel = self._connection.open_channel()
        self._stub = rpc.GenerationServiceStub(self._channel)

    def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Make the clips of a prompt, and wait for them. `timeout` in seconds."""
        request = build_request(prompt, **options)
        with self._connection.errors():
            return read_response(self._stub.GenerateAudio(request, **self._connection.call_options(timeout)))

    def stream(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        preview_interval_steps: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Update]:
        """Make the clips of a prompt, and tell what happens on the way. Leaving the loop cancels the rest."""
        request = _stream_request(build_request(prompt, **options), preview_interval_steps)
        return self._updates(request, timeout)

    def _updates(self, request: pb.StreamGenerateAudioRequest, timeout: float | None) -> Iterator[Update]:
        call = self._stub.StreamGenerateAudio(request, **self._connection.call_options(timeout))
        try:
            with self._connection.errors():
                for message in call:
                    yield read_update(message)
        finally:
            call.cancel()

    def get_model(self, *, timeout: float | None = None) -> pb.GetModelResponse:
        """Which model is served, with its limits and defaults."""
        with self._connection.errors():
            return self._stub.GetModel(pb.GetModelRequest(), **self._connection.call_options(timeout))

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncAudioClient:
    """`AudioClient` for asyncio: the same arguments, answers and errors. Make it inside the running loop."""

    def __init__(self, target: str, **options: Unpack[ConnectionOptions]) -> None:
        """As `AudioClient`."""
        self._connection = _Connection(target, **options)
        self._channel = self._connection.open_async_channel()
        self._stub = rpc.GenerationServiceStub(self._channel)

    async def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """As `AudioClient.generate`."""
        request = build_request(prompt, **options)
        with self._connection.errors():
            return read_response(
                await self._stub.GenerateAudio(request, **self._connection.call_options(timeout))
            )

    async def stream(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        preview_interval_steps: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncIterator[Update]:
        """As `AudioClient.stream`, for ``async for``."""
        request = _stream_request(build_request(prompt, **options), preview_interval_steps)
        call = self._stub.StreamGenerateAudio(request, **self._connection.call_options(timeout))
        try:
            with self._connection.errors():
                async for message in call:
                    yield read_update(message)
        finally:
            call.cancel()

    async def get_model(self, *, timeout: float | None = None) -> pb.GetModelResponse:
        """As `AudioClient.get_model`."""
        with self._connection.errors():
            return await self._stub.GetModel(pb.GetModelRequest(), **self._connection.call_options(timeout))

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Connection:
    """What both faces know of a service: where it is, how to speak to it, how long to wait."""

    def __init__(
        self,
        target: str,
        *,
        tls: TLS | None = None,
        token: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retries: int = 3,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        if token is not None and tls is None:
            raise InvalidInputError(FieldViolation("token", "would travel in plaintext; give tls as well"))
        if not 0 <= retries < _MAX_ATTEMPTS:
            raise InvalidInputError(
                FieldViolation("retries", f"is {retries}, must be between 0 and {_MAX_ATTEMPTS - 1}")
            )
        self._target = target
        self._timeout = timeout
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._options = _channel_options(retries, max_response_bytes, tls)
        self._credentials = None if tls is None else _credentials(tls)

    def open_channel(self) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(self._target, options=self._options)
        return grpc.secure_channel(self._target, self._credentials, options=self._options)

    def open_async_channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._target, options=self._options)
        return grpc.aio.secure_channel(self._target, self._credentials, options=self._options)

    def call_options(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": self._metadata}

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise `services.errors` in the place of gRPC's error."""
        try:
            yield
        except grpc.RpcError as error:
            raise _to_error(error, self._target) from error


def read_response(response: pb.GenerateAudioResponse) -> Generation:
    """Read the answer of GenerateAudio."""
    clips = tuple(_read_clip(clip) for clip in response.clips)
    return Generation(
        clips=clips,
        seed=clips[0].seed if clips else 0,
        model=_read_model(response.model),
        warnings=tuple(response.warnings),
        timings=_read_timings(response.timings),
    )


def read_update(response: pb.StreamGenerateAudioResponse) -> Update:
    """Read one event of StreamGenerateAudio.

    Raises:
        MilongaError: an event that this client is too old to know.
    """
    match response.WhichOneof("event"):
        case "queued":
            return Queued(position=response.queued.position)
        case "progress":
            return _read_progress(response.progress)
        case "preview":
            return _read_preview(response.preview)
        case "clip":
            return _read_clip(response.clip)
        case "finished":
            return Finished(
                model=_read_model(response.finished.model),
                warnings=tuple(response.finished.warnings),
                timings=_read_timings(response.finished.timings),
            )
        case _:
            raise MilongaError("the service sent an event that this client does not know; update milonga")


def _read_progress(event: pb.ProgressEvent) -> Progress:
    return Progress(
        clip_index=event.clip_index,
        step=event.step,
        num_inference_steps=event.num_inference_steps,
        fraction=event.fraction,
        seconds_left=_seconds(event.time_left) if event.HasField("time_left") else None,
    )


def _read_preview(event: pb.PreviewEvent) -> Preview:
    mel_TM = np.frombuffer(event.log_mel, dtype=np.uint8).reshape(event.frame_count, event.mel_bin_count)
    return Preview(clip_index=event.clip_index, step=event.step, mel_TM=mel_TM)


def _read_clip(generated: pb.GeneratedClip) -> Clip:
    return Clip(
        audio=generated.clip.audio,
        encoding=audio.encoding_name(generated.clip.encoding) or "unknown",
        sampling_rate=generated.clip.sample_rate_hertz,
        duration=_seconds(generated.clip.duration),
        index=generated.clip_index,
        seed=generated.seed,
    )


def _read_model(model: model_pb2.ModelVersion) -> ModelVersion:
    return ModelVersion(name=model.name, version=model.version, digest=model.digest, license=model.license)


def _read_timings(timings: pb.GenerationTimings) -> Timings:
    return Timings(
        queued=_seconds(timings.queued),
        encode=_seconds(timings.encode),
        denoise=_seconds(timings.denoise),
        decode=_seconds(timings.decode),
        total=_seconds(timings.total),
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _set_duration(duration: Duration, seconds: float) -> tuple[FieldViolation, ...]:
    try:
        duration.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError):
        return (FieldViolation("duration", f"is {seconds}, which is no length of time; give finite seconds"),)
    return ()


def _stream_request(request: pb.GenerateAudioRequest, interval: int | None) -> pb.StreamGenerateAudioRequest:
    try:
        return pb.StreamGenerateAudioRequest(request=request, preview_interval_steps=interval)
    except (ValueError, TypeError) as error:
        raise InvalidInputError(
            FieldViolation("preview_interval_steps", f"is {interval!r}: {error}")
        ) from error


def _to_error(error: grpc.RpcError, target: str) -> MilongaError:
    # Errors of calls are calls themselves; the stubs' types do not say so.
    call = error
    assert isinstance(call, grpc.Call | grpc.aio.AioRpcError)
    details = dict(call.trailing_metadata() or ()).get(status.DETAILS_KEY)
    found = status.from_status(
        call.code(), call.details() or "", details if isinstance(details, bytes) else None
    )
    if isinstance(found, InvalidInputError):
        # One spelling for the caller, whichever rpc it was.
        return InvalidInputError(
            *(FieldViolation(v.field.removeprefix("request."), v.description) for v in found.violations)
        )
    if isinstance(found, DeadlineExceededError):
        # Most often gRPC's own words, which name neither cause nor remedy.
        return DeadlineExceededError(
            f"{target}: the deadline passed ({found}); give a longer timeout or take fewer steps"
        )
    if isinstance(found, ServiceUnavailableError):
        return ServiceUnavailableError(
            f"{target}: {found}; is it running? start one with: milonga serve generation"
        )
    return found


def _channel_options(retries: int, max_response_bytes: int, tls: TLS | None) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", max_response_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MILLISECONDS),
        ("grpc.service_config", json.dumps(_service_config(retries))),
        ("grpc.enable_retries", int(retries > 0)),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _service_config(retries: int) -> dict[str, Any]:
    method: dict[str, Any] = {"name": [{"service": "milonga.v1.GenerationService"}]}
    if retries > 0:
        method["retryPolicy"] = {
            "maxAttempts": retries + 1,
            "initialBackoff": "0.2s",
            "maxBackoff": "5s",
            "backoffMultiplier": 3,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
    # gRPC holds on to one connection: without round robin, all calls would go to one replica.
    return {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [method]}


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    authorities = None if tls.ca_file is None else read_authorities("tls.ca_file", tls.ca_file)
    chain, key = None, None
    if tls.cert_file is not None and tls.key_file is not None:
        chain, key = read_identity("tls.cert_file", tls.cert_file, "tls.key_file", tls.key_file)
    return grpc.ssl_channel_credentials(authorities, key, chain)
