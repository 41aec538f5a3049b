"""The scoring service as a model of the Open Inference Protocol: prompts and clips in, scores out.

Imports no torch. Shapes: n pairs of a prompt and a clip.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from milonga.v1 import scoring_pb2 as pb
from services.catalogue import SCORING
from services.inference import Response, Stages, Tensors, TensorSpec
from services.inference.model import Caller
from services.inference.pairs import INPUTS, limits_of, read_pairs, warning_parameters

if TYPE_CHECKING:
    from services.scoring.servicer import ScoringServicer


def outputs_of(scorers: int) -> Sequence[TensorSpec]:
    """Return the specs of the output tensors for a number of scorers, one column each."""
    return (
        TensorSpec(name="SCORE", field="scores", datatype="FP32", dims=("n", scorers)),
        TensorSpec(name="READABLE", field="unread", datatype="BOOL", dims=("n", scorers)),
        TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n", scorers)),
    )


class ScoringInference:
    """The service's scorers, as `services.inference.model.Model`. Each scorer is a column of SCORE."""

    name, inputs, decoupled = SCORING.model, INPUTS, False

    def __init__(self, servicer: "ScoringServicer") -> None:
        self._servicer = servicer
        self.outputs = outputs_of(len(servicer.scorers))
        self.max_rows = servicer.bounds.max_batch_size
        self.limits = limits_of(servicer.bounds)
        versions = {name: scorer.version for name, scorer in servicer.scorers.items()}
        self.version = ",".join(dict.fromkeys(version.version for version in versions.values()))
        self._digests = [version.digest.encode() for version in versions.values()]
        self.parameters = {"scorers": ",".join(versions)}
        for name, version in versions.items():
            self.parameters |= {
                f"name.{name}": version.name,
                f"version.{name}": version.version,
                f"digest.{name}": version.digest,
            }

    def lease(self) -> AbstractContextManager["ScoringInference"]:
        """Return a context with this object itself: the scorers never change."""
        return nullcontext(self)

    def read(self, tensors: Tensors) -> pb.BatchScoreAudioRequest:
        """Return the request of BatchScoreAudio, which decodes and checks the pairs."""
        return pb.BatchScoreAudioRequest(pairs=read_pairs(tensors))

    async def run(
        self, job: pb.BatchScoreAudioRequest, caller: Caller, *, stream: bool
    ) -> AsyncGenerator[Response, None]:
        """Call BatchScoreAudio and yield one response."""
        start, rows = time.monotonic(), len(job.pairs)
        running = self._servicer.BatchScoreAudio(job, caller)
        del job  # its clips are not needed once they are decoded
        answer = await running
        yield Response(
            outputs={
                "SCORE": np.array([result.scores for result in answer.results], dtype=np.float32),
                "READABLE": ~np.array(
                    [list(result.unread) or [False] * len(self._digests) for result in answer.results]
                ),
                "DIGEST": np.array([self._digests] * rows, dtype=object),
            },
            parameters=warning_parameters(result.warnings for result in answer.results),
            rows=rows,
            stages=Stages(compute_infer=time.monotonic() - start),
            final=True,
        )
