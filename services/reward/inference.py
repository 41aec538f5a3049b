"""The reward service as a model of the Open Inference Protocol: REWARD of prompts and their clips.

Shapes: n pairs.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from milonga.v1 import reward_pb2 as pb
from services.audio.clips import AudioBounds
from services.inference import Response, Stages, Tensors
from services.inference.model import Caller
from services.inference.pairs import limits_of, read_pairs
from services.reward.judge import Judge
from services.reward.servicer import RewardServicer
from services.reward.tensors import INPUTS, NAME, OUTPUTS


class JudgeModel:
    """The reward model of a service."""

    name, inputs, outputs, decoupled = NAME, INPUTS, OUTPUTS, False

    def __init__(self, servicer: RewardServicer, judge: Judge, bounds: AudioBounds) -> None:
        self._servicer = servicer
        self.max_rows = bounds.max_batch_size
        self.limits = limits_of(bounds)
        self.version = judge.version.version
        self.parameters = {
            "name": judge.version.name,
            "version": judge.version.version,
            "digest": judge.version.digest,
        }

    def lease(self) -> AbstractContextManager["JudgeModel"]:
        """Itself: the weights stay."""
        return nullcontext(self)

    def read(self, tensors: Tensors) -> pb.BatchComputeRewardsRequest:
        """Return the native API's request; it decodes and checks the pairs."""
        return pb.BatchComputeRewardsRequest(pairs=read_pairs(tensors))

    async def run(
        self, job: pb.BatchComputeRewardsRequest, caller: Caller, *, stream: bool
    ) -> AsyncGenerator[Response, None]:
        """Yield the one answer."""
        start = time.monotonic()
        answer = await self._servicer.BatchComputeRewards(job, caller)
        yield Response(
            outputs={
                "REWARD": np.array([[one.logit] for one in answer.rewards], dtype=np.float32),
                "PROBABILITY": np.array([[one.probability] for one in answer.rewards], dtype=np.float32),
                "DIGEST": np.array([[self.parameters["digest"].encode()]] * len(job.pairs), dtype=object),
            },
            rows=len(job.pairs),
            stages=Stages(compute_infer=time.monotonic() - start),
            final=True,
        )
