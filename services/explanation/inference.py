"""The explanation service as a model of the Open Inference Protocol: a prompt in, words × frames out.

Imports no torch. Shapes: n = 1 prompt, N samples.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from milonga.v1 import explanation_pb2 as pb
from services.api.explanation import Explanation, ExplanationProgress, as_requested
from services.api.generation import Queued
from services.catalogue import EXPLANATION
from services.errors import FieldViolation, InvalidInputError
from services.inference import Response, Stages, Tensors, TensorSpec, texts
from services.inference.model import Caller
from services.inference.pairs import CLIPS, read_clips
from services.inference.tensors import decimals
from services.wire import WIRE_ENCODINGS, write_duration

if TYPE_CHECKING:
    from services.explanation.servicer import ExplanationServicer

PROMPT: Final = TensorSpec(name="PROMPT", field="request.prompt", datatype="BYTES", dims=("n",))


def _option(field: str, datatype: str) -> TensorSpec:
    name = field.rpartition(".")[2].upper()
    return TensorSpec(name=name, field=field, datatype=datatype, dims=("n",), optional=True)


OPTIONS: Final = (
    _option("method", "BYTES"),
    _option("without", "BYTES"),
    _option("replacement", "BYTES"),
    _option("iterations", "INT32"),
    _option("request.negative_prompt", "BYTES"),
    _option("request.seed", "INT64"),
    _option("request.num_inference_steps", "INT32"),
    _option("request.guidance_scale", "FP32"),
    _option("request.guidance_stop", "FP32"),
    _option("request.duration", "FP32"),
    _option("request.scheduler", "BYTES"),
)
INPUTS: Final = (PROMPT, *OPTIONS, *CLIPS)

OUTPUTS: Final = (
    TensorSpec(name="MATRIX", field="values", datatype="FP32", dims=("words", "frames")),
    TensorSpec(name="WORDS", field="words", datatype="BYTES", dims=("words",)),
    TensorSpec(name="FRAME_SECONDS", field="frame_duration", datatype="FP32", dims=(1,)),
    TensorSpec(name="AUDIO", field="clip", datatype="FP32", dims=("n", "samples")),
    TensorSpec(name="SAMPLE_RATE", field="sample_rate_hertz", datatype="INT32", dims=(1,)),
    TensorSpec(name="SEED", field="seed", datatype="INT64", dims=("n",)),
    TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n",)),
    TensorSpec(name="PROGRESS", field="progress", datatype="FP32", dims=(1,), optional=True),
)
"""A response of a stream has PROGRESS, the last one all other tensors. Clips without words are answered by
the native API only."""


class ExplanationInference:
    """The service's explainer, as `services.inference.model.Model`."""

    name, inputs, outputs, decoupled, max_rows = EXPLANATION.model, INPUTS, OUTPUTS, True, 1

    def __init__(self, servicer: "ExplanationServicer") -> None:
        self._servicer = servicer
        version, model = servicer.worker.version, servicer.worker.description
        self.version = version.version
        self.parameters = {"name": version.name, "version": version.version, "digest": version.digest}
        self.limits: Mapping[str, str] = {
            "methods": ",".join(model.methods),
            "max_words": str(model.max_words),
            "max_duration": f"{model.generation.limits.max_duration:g}",
        }

    def lease(self) -> AbstractContextManager["ExplanationInference"]:
        """Return a context with this object itself: the weights never change."""
        return nullcontext(self)

    def read(self, tensors: Tensors) -> pb.ExplainAudioRequest:
        """Return the request of ExplainAudio, whose reader decodes and checks it."""
        message = pb.ExplainAudioRequest()
        message.request.encoding = WIRE_ENCODINGS["float32"]
        faults: list[FieldViolation] = []
        for spec in (PROMPT, *OPTIONS):
            values: Any = tensors.get(spec.name)
            if values is None:
                continue
            if spec.datatype == "BYTES":
                values, wrong = texts(tensors, spec)
                faults += wrong
            elif spec.datatype == "FP32":
                values = decimals(values)
            inner, _, name = spec.field.rpartition(".")
            try:
                if name == "duration":
                    message.request.duration.CopyFrom(write_duration(values[0]))
                else:
                    setattr(message.request if inner else message, name, _plain(values[0]))
            except (ValueError, OverflowError):
                faults.append(FieldViolation(spec.field, f"is {values[0]}, which is out of range"))
        if any(spec.name in tensors for spec in CLIPS):
            message.clip.CopyFrom(next(read_clips(tensors)))
        if faults:
            raise InvalidInputError(*faults)
        return message

    async def run(
        self, job: pb.ExplainAudioRequest, caller: Caller, *, stream: bool
    ) -> AsyncGenerator[Response, None]:
        """Yield progress, if `stream`, and the explanation."""
        from services.explanation.servicer import explain

        start = time.monotonic()
        request = await self._servicer.read(job)
        read = time.monotonic()
        async with aclosing(explain(self._servicer.worker, request)) as events:
            async for event in events:
                match event:
                    case Queued() if stream:
                        yield _progress(0.0)
                    case ExplanationProgress() if stream:
                        yield _progress(event.fraction)
                    case Explanation():
                        stages = Stages(compute_input=read - start, compute_infer=time.monotonic() - read)
                        yield self._answer(as_requested(event, request), stages)

    def _answer(self, found: Explanation, stages: Stages) -> Response:
        return Response(
            outputs={
                "MATRIX": found.matrix_WT.astype(np.float32),
                "WORDS": np.array([word.encode() for word in found.words], dtype=object),
                "FRAME_SECONDS": np.array([found.frame_seconds], dtype=np.float32),
                "AUDIO": found.clip.waveform()[None],
                "SAMPLE_RATE": np.array([found.clip.sampling_rate], dtype=np.int32),
                # As in the native API: the wire has no unsigned numbers.
                "SEED": np.array([found.seed], dtype=np.uint64).astype(np.int64),
                "DIGEST": np.array([self.parameters["digest"].encode()], dtype=object),
            },
            parameters={"method": found.method}
            | ({"warnings": "\n".join(found.warnings)} if found.warnings else {}),
            rows=1,
            stages=stages,
            final=True,
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _progress(fraction: float) -> Response:
    return Response(outputs={"PROGRESS": np.array([fraction], dtype=np.float32)})
