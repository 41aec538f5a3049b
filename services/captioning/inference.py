"""The captioning service as a model of the Open Inference Protocol: clips in, CAPTION out.

Imports no torch. Shapes: n clips.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import numpy as np

from milonga.v1 import captioning_pb2 as pb
from services.catalogue import CAPTIONING
from services.inference import Response, Stages, Tensors, TensorSpec
from services.inference.model import Caller
from services.inference.pairs import CLIPS, limits_of, read_clips, warning_parameters
from services.wire import read_duration

if TYPE_CHECKING:
    from services.captioning.servicer import CaptioningServicer

OUTPUTS: Final = (
    TensorSpec(name="CAPTION", field="text", datatype="BYTES", dims=("n", 1)),
    TensorSpec(name="CANDIDATES", field="candidates", datatype="BYTES", dims=("n", "candidates")),
    TensorSpec(name="SCORES", field="clap_score", datatype="FP32", dims=("n", "candidates")),
    TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n", 1)),
)
"""CANDIDATES are the best first; SCORES are their CLAP scores, NaN without one."""


class CaptioningInference:
    """The service's captioner, as `services.inference.model.Model`."""

    name, inputs, outputs, decoupled = CAPTIONING.model, CLIPS, OUTPUTS, False

    def __init__(self, servicer: "CaptioningServicer") -> None:
        self._servicer = servicer
        self.max_rows = servicer.bounds.max_batch_size
        self.limits = limits_of(servicer.bounds)
        version = servicer.worker.model.version
        self.version = version.version
        self.parameters = {"name": version.name, "version": version.version, "digest": version.digest}

    def lease(self) -> AbstractContextManager["CaptioningInference"]:
        """Return a context with this object itself: the weights never change."""
        return nullcontext(self)

    def read(self, tensors: Tensors) -> pb.CaptionAudioRequest:
        """Return the request of CaptionAudio, which decodes and checks the clips."""
        return pb.CaptionAudioRequest(clips=read_clips(tensors))

    async def run(
        self, job: pb.CaptionAudioRequest, caller: Caller, *, stream: bool
    ) -> AsyncGenerator[Response, None]:
        """Call CaptionAudio and yield one response."""
        start = time.monotonic()
        running = self._servicer.CaptionAudio(job, caller)
        del job  # its clips are not needed once they are decoded
        answer = await running
        captions, timings = answer.captions, answer.timings
        prepare = read_duration(timings.prepare)
        by = {"scorer": answer.scorer.name, "scorer_digest": answer.scorer.model.digest}
        yield Response(
            outputs={
                "CAPTION": np.array([[one.text.encode()] for one in captions], dtype=object),
                "CANDIDATES": np.array(
                    [[candidate.text.encode() for candidate in one.candidates] for one in captions],
                    dtype=object,
                ),
                "SCORES": np.array([_scores(one.candidates) for one in captions], dtype=np.float32),
                "DIGEST": np.array([[self.parameters["digest"].encode()]] * len(captions), dtype=object),
            },
            parameters=warning_parameters(one.warnings for one in captions)
            | (by if answer.HasField("scorer") else {}),
            rows=len(captions),
            stages=Stages(compute_input=prepare, compute_infer=time.monotonic() - start - prepare),
            final=True,
        )


def _scores(candidates: Sequence[pb.CaptionCandidate]) -> list[float]:
    return [one.clap_score if one.HasField("clap_score") else np.nan for one in candidates]
