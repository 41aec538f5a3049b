"""The rpcs of explanation.proto: requests from arguments, values from messages."""

from typing import Unpack

import numpy as np

from milonga.v1 import audio_pb2
from milonga.v1 import explanation_pb2 as pb
from milonga.v1 import explanation_pb2_grpc as rpc
from services.api.explanation import (
    ExplainerModel,
    Explanation,
    ExplanationOptions,
    ExplanationProgress,
    ExplanationUpdate,
    Variant,
)
from services.api.generation import Clip, GenerationOptions, Queued
from services.client.generation import build_request, read_model
from services.client.sounds import RequestWriter
from services.client.transport import Service, Stream, Unary
from services.errors import FieldViolation, InvalidInputError, MilongaError
from services.wire import encoding_name, read_duration, read_version

OWN_OPTIONS = frozenset(ExplanationOptions.__annotations__) - frozenset(GenerationOptions.__annotations__)
"""Options of an explanation that a generation does not have."""


def explanation_request(prompt: str, **options: Unpack[ExplanationOptions]) -> pb.ExplainAudioRequest:
    """Return the message of ExplainAudio.

    Raises:
        InvalidInputError: what the wire can't carry, all at once.
    """
    given = {name: value for name, value in options.items() if value is not None}
    own = {name: given.pop(name) for name in OWN_OPTIONS & given.keys()}
    message, write = pb.ExplainAudioRequest(), RequestWriter()
    faults: tuple[FieldViolation, ...] = ()
    try:
        message.request.CopyFrom(build_request(prompt, **given))  # type: ignore[arg-type]
    except InvalidInputError as error:
        faults = error.violations
    for name, value in own.items():
        if name == "clip":
            message.clip.CopyFrom(write.sound(value, name))  # type: ignore[arg-type]
            continue
        with write.refusing(name, value):
            setattr(message, name, value)
    try:
        write.checked(message)
    except InvalidInputError as error:
        faults += error.violations
    if faults:
        raise InvalidInputError(*faults)
    return message


def read_update(response: pb.ExplainAudioResponse) -> ExplanationUpdate | Explanation:
    """Return the value of an event. The prompt of an explanation is empty: the wire does not repeat it.

    Raises:
        MilongaError: the event is unknown, since the client is too old.
    """
    match response.WhichOneof("event"):
        case "queued":
            return Queued(position=response.queued.position)
        case "progress":
            return ExplanationProgress(stage=response.progress.stage, fraction=response.progress.fraction)
        case "explanation":
            return _read_explanation(response.explanation)
        case _:
            raise MilongaError("the service sent an event that this client does not know; update milonga")


def read_explainer(response: pb.GetExplainerResponse) -> ExplainerModel:
    """Return the value of a response of GetExplainer."""
    return ExplainerModel(
        generation=read_model(response.generator),
        methods=tuple(response.methods),
        frame_seconds=read_duration(response.frame_duration),
        max_words=response.max_words,
        iterations=response.iterations,
        explains_given=response.explains_given,
        makes_variants=response.makes_variants,
    )


def _read_explanation(message: pb.Explanation) -> Explanation:
    values = np.array(message.values, dtype=np.float32)
    return Explanation(
        prompt="",
        words=tuple(message.words),
        matrix_WT=values.reshape(len(message.words), message.frame_count),
        frame_seconds=read_duration(message.frame_duration),
        method=message.method,
        seed=message.seed,
        model=read_version(message.model),
        warnings=tuple(message.warnings),
        clip=_read_clip(message.clip, message.seed),
        variants=tuple(
            Variant(
                kind=one.kind, words=one.words, prompt=one.prompt, clip=_read_clip(one.clip, message.seed)
            )
            for one in message.variants
        ),
        mask_size=message.mask_size if message.HasField("mask_size") else None,
        iterations=message.iterations,
        seconds=read_duration(message.elapsed),
    )


def _read_clip(message: audio_pb2.Clip, seed: int) -> Clip:
    return Clip(
        audio=message.audio,
        encoding=encoding_name(message.encoding) or "unknown",
        sampling_rate=message.sample_rate_hertz,
        duration=read_duration(message.duration),
        index=0,
        seed=seed,
    )


SERVICE = Service(
    name="explanation",
    argument="explanation",
    stub=rpc.ExplanationServiceStub,
    remedy="take fewer steps, or another method",
)
EXPLAIN_AUDIO = Stream(
    service=SERVICE, method=lambda stub: stub.ExplainAudio, read=read_update, last=Explanation
)
GET_EXPLAINER = Unary(service=SERVICE, method=lambda stub: stub.GetExplainer, read=read_explainer)
