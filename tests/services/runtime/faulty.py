"""The reward service as a program, with a model whose faults callers ask for by their prompts.

python -m tests.services.runtime.faulty [FAULT OF THE PROCESS]
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.models.reward.model import RewardClip, RewardModel
from services.reward.model import RewardScorer
from services.reward.serve import SERVICE
from services.reward.settings import RewardSettings
from services.runtime import server, serving
from services.runtime.serving import main
from tests.services.reward.serving import CLAP, MODEL
from tests.services.runtime.fault_prompts import BREAK, ERROR, EXIT, HANG, LARGE, NAN
from tests.tiny import tiny_clap, tiny_reward

CLOSE_SECONDS = 2.0
"""Maximum time to close where that is impossible; shorter than the services', which the test waits for."""
ROOM = 3
"""Pairs in a batch that fit into memory."""
BLOCKED_LOOP, BLOCKED_THREAD, BLOCKED_FAILURE = "blocked loop", "blocked thread", "blocked failure"
"""Faults of the process: what keeps it from closing; the event loop that is blocked while the model fails."""


class Faulty(RewardModel):
    broken: bool

    def reward(self, prompts: Sequence[str], clips: Sequence[RewardClip]) -> Tensor:
        """Raise, hang or return what the prompts ask for."""
        self.broken = self.broken or BREAK in prompts
        if self.broken or ERROR in prompts:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if HANG in prompts:
            threading.Event().wait()
        if EXIT in prompts:
            raise SystemExit(0)
        if LARGE in prompts or len(prompts) > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rewards_B = super().reward(prompts, clips)
        return torch.where(torch.tensor([prompt == NAN for prompt in prompts]), torch.nan, rewards_B)


def faulty() -> Faulty:
    """Return a tiny reward model with faults."""
    model = tiny_reward(tiny_clap())
    model.__class__ = Faulty
    assert isinstance(model, Faulty)
    model.broken = False
    return model


def _load(settings: RewardSettings) -> RewardScorer:
    return RewardScorer(faulty(), MODEL, CLAP, settings)


def _watch(scorer: RewardScorer, on_failure: Callable[[str], None]) -> None:
    scorer.batcher.watch(on_failure)
    if BLOCKED_FAILURE in sys.argv:
        asyncio.get_running_loop().call_later(1.0, time.sleep, 3600)
        threading.Timer(2.0, on_failure, ["a test"]).start()


async def _close(scorer: RewardScorer) -> None:
    if BLOCKED_LOOP in sys.argv:
        time.sleep(3600)
    if BLOCKED_THREAD in sys.argv:
        await asyncio.to_thread(time.sleep, 3600)
    await scorer.batcher.close()


if __name__ == "__main__":
    for module in (server, serving) if sys.argv[1:] else ():
        pytest.MonkeyPatch().setattr(module, "CLOSE_SECONDS", CLOSE_SECONDS)
    sys.exit(main(replace(SERVICE, load=_load, watch=_watch, close=_close)))
