"""Convert requests and answers of explanation.proto between the wire and Python. Pure functions."""

from dataclasses import replace

from milonga.v1 import explanation_pb2 as pb
from milonga.v1 import generation_pb2
from services.api.explanation import (
    MAX_ITERATIONS,
    ExplainerModel,
    Explanation,
    ExplanationProgress,
    ExplanationRequest,
    ExplanationUpdate,
    explanation_violations,
)
from services.api.generation import Queued
from services.audio.decoding import ReadClip
from services.errors import FieldViolation
from services.wire import write_duration, write_version
from services.wire.generation import read_generation, write_model, write_sound

_INNER = frozenset(generation_pb2.GenerateAudioRequest.DESCRIPTOR.fields_by_name)


def read_explanation_request(
    message: pb.ExplainAudioRequest, model: ExplainerModel, given: ReadClip | None
) -> tuple[ExplanationRequest, tuple[FieldViolation, ...]]:
    """Return the request, with the clip of the message decoded as `given`, and its violations.

    Those of the generation are named as on the wire: ``request.prompt``.
    """
    generation, faults = read_generation(message.request, model.generation)
    if given is not None:
        generation = replace(generation, duration=given.seconds)
    request = ExplanationRequest(
        generation=generation,
        method=message.method or model.methods[0],
        given=given,
        without=message.without,
        replacement=message.replacement,
        iterations=message.iterations or model.iterations,
    )
    found = list(explanation_violations(request, model))
    # An unknown encoding has no value in the request.
    found += [fault for fault in faults if fault.field not in {one.field for one in found} | {"duration"}]
    return request, tuple(_as_inner(fault) for fault in found)


def write_update(update: ExplanationUpdate) -> pb.ExplainAudioResponse:
    """Return the message of an update."""
    match update:
        case Queued():
            return pb.ExplainAudioResponse(queued=generation_pb2.QueuedEvent(position=update.position))
        case ExplanationProgress():
            return pb.ExplainAudioResponse(
                progress=pb.ExplanationProgressEvent(stage=update.stage, fraction=update.fraction)
            )


def write_explanation(explanation: Explanation) -> pb.ExplainAudioResponse:
    """Return the message of the answer; its clips keep their encodings."""
    message = pb.Explanation(
        words=explanation.words,
        frame_count=explanation.matrix_WT.shape[1],
        values=explanation.matrix_WT.ravel().tolist(),
        frame_duration=write_duration(explanation.frame_seconds),
        method=explanation.method,
        seed=explanation.seed,
        model=write_version(explanation.model),
        warnings=explanation.warnings,
        clip=write_sound(explanation.clip),
        variants=[
            pb.ExplanationVariant(
                kind=one.kind, words=one.words, prompt=one.prompt, clip=write_sound(one.clip)
            )
            for one in explanation.variants
        ],
        mask_size=explanation.mask_size,
        iterations=explanation.iterations,
        elapsed=write_duration(explanation.seconds),
    )
    return pb.ExplainAudioResponse(explanation=message)


def write_explainer(model: ExplainerModel) -> pb.GetExplainerResponse:
    """Return the response of GetExplainer."""
    return pb.GetExplainerResponse(
        generator=write_model(model.generation),
        methods=model.methods,
        frame_duration=write_duration(model.frame_seconds),
        max_words=model.max_words,
        iterations=model.iterations,
        max_iterations=MAX_ITERATIONS,
        explains_given=model.explains_given,
        makes_variants=model.makes_variants,
    )


def _as_inner(fault: FieldViolation) -> FieldViolation:
    return replace(fault, field=f"request.{fault.field}") if fault.field in _INNER else fault
