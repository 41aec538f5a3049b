"""The reward service as a model of the Open Inference Protocol: REWARD of prompts and their clips.

Shapes: n pairs.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np

from milonga.v1 import audio_pb2
from milonga.v1 import reward_pb2 as pb
from services.reward.judge import Judge
from services.reward.servicer import RewardServicer
from services.runtime.clips import AudioBounds
from services.runtime.inference import Response, Stages, Tensors, TensorSpec
from services.runtime.inference.model import Context
from services.runtime.inference.pairs import INPUTS, limits_of, read_pairs

NAME: Final = "reward"
"""The model's name, whichever weights are served."""

OUTPUTS: Final = (
    TensorSpec(name="REWARD", field="logit", forms={"FP32": ("n",)}),
    TensorSpec(name="PROBABILITY", field="probability", forms={"FP32": ("n",)}),
)


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

    def read(self, tensors: Tensors) -> list[audio_pb2.PromptedClip]:
        """Return the pairs; the native API decodes and checks them."""
        return read_pairs(tensors)

    async def run(
        self, job: Sequence[audio_pb2.PromptedClip], context: Context, *, stream: bool
    ) -> AsyncGenerator[Response, None]:
        """Yield the one answer."""
        start = time.monotonic()
        answer = await self._servicer.BatchComputeRewards(pb.BatchComputeRewardsRequest(pairs=job), context)
        yield Response(
            outputs={
                "REWARD": np.array([reward.logit for reward in answer.rewards], dtype=np.float32),
                "PROBABILITY": np.array([reward.probability for reward in answer.rewards], dtype=np.float32),
            },
            rows=len(job),
            stages=Stages(compute_infer=time.monotonic() - start),
            final=True,
        )
