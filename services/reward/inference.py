"""The reward service as a model of the Open Inference Protocol: prompts and clips in, rewards out.

Imports no torch. Shapes: n pairs of a prompt and a clip.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import numpy as np

from milonga.v1 import reward_pb2 as pb
from services.catalogue import REWARD
from services.inference import Response, Stages, Tensors, TensorSpec
from services.inference.model import Caller
from services.inference.pairs import INPUTS, limits_of, read_pairs, warning_parameters

if TYPE_CHECKING:
    from services.reward.servicer import RewardServicer

OUTPUTS: Final = (
    TensorSpec(name="REWARD", field="logit", datatype="FP32", dims=("n", 1)),
    TensorSpec(name="PROBABILITY", field="probability", datatype="FP32", dims=("n", 1)),
    TensorSpec(name="READABLE", field="unread", datatype="BOOL", dims=("n", 1)),
    TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n", 1)),
)


class RewardInference:
    """The service's reward model, as `services.inference.model.Model`."""

    name, inputs, outputs, decoupled = REWARD.model, INPUTS, OUTPUTS, False

    def __init__(self, servicer: "RewardServicer") -> None:
        self._servicer = servicer
        self.max_rows = servicer.bounds.max_batch_size
        self.limits = limits_of(servicer.bounds)
        version = servicer.scorer.version
        self.version = version.version
        self.parameters = {"name": version.name, "version": version.version, "digest": version.digest}

    def lease(self) -> AbstractContextManager["RewardInference"]:
        """Return a context with this object itself: the weights never change."""
        return nullcontext(self)

    def read(self, tensors: Tensors) -> pb.BatchComputeRewardsRequest:
        """Return the request of BatchComputeRewards, which decodes and checks the pairs."""
        return pb.BatchComputeRewardsRequest(pairs=read_pairs(tensors))

    async def run(
        self, job: pb.BatchComputeRewardsRequest, caller: Caller, *, stream: bool
    ) -> AsyncGenerator[Response, None]:
        """Call BatchComputeRewards and yield one response."""
        start, rows = time.monotonic(), len(job.pairs)
        running = self._servicer.BatchComputeRewards(job, caller)
        del job  # its clips are not needed once they are decoded
        answer = await running
        yield Response(
            outputs={
                "REWARD": np.array([[one.logit] for one in answer.rewards], dtype=np.float32),
                "PROBABILITY": np.array([[one.probability] for one in answer.rewards], dtype=np.float32),
                "READABLE": np.array([[not one.unread] for one in answer.rewards]),
                "DIGEST": np.array([[self.parameters["digest"].encode()]] * rows, dtype=object),
            },
            parameters=warning_parameters(one.warnings for one in answer.rewards),
            rows=rows,
            stages=Stages(compute_infer=time.monotonic() - start),
            final=True,
        )
