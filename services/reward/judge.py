"""The judge: a reward model with its batches. Loading it.

Shape legend: B pairs.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from services.audio.clips import ReadClip
from services.catalogue import REWARD
from services.models.reward.model import RewardClip, RewardModel, load_reward
from services.reward.settings import CLAP, RewardSettings
from services.runtime.microbatching import BatchStats, MicroBatcher
from services.weights.loading import load_clap_model
from services.weights.uri import ResolvedModel, naming

Pair = tuple[str, RewardClip]
"""A prompt, and a clip as the model hears it."""


class Judge:
    """A loaded model. Pairs of concurrent calls are judged together, on a worker thread."""

    def __init__(
        self, model: RewardModel, version: ResolvedModel, clap: ResolvedModel, settings: RewardSettings
    ) -> None:
        """Args:
        model: the weights.
        version: which they are.
        clap: which CLAP model they stand on.
        settings: how calls are gathered.
        """
        self.version, self.clap = version.identity, clap.identity
        self.folder = version.folder
        self.sampling_rate = model.clap.sampling_rate
        self._model, self._threads = model, settings.threads
        self._batcher: MicroBatcher[Pair, float] = MicroBatcher(
            self._run,
            cost=lambda pair: pair[1].windows_WS.numel() / model.clap.sampling_rate,
            max_cost=settings.max_batch_seconds,
            max_wait=settings.max_wait_seconds,
            max_queue_cost=settings.max_queue_seconds,
            initialize=self._set_threads,
        )

    @property
    def stats(self) -> BatchStats:
        """What it has done; costs are seconds of windows."""
        return self._batcher.stats

    def check(self, seconds: float = 0.0) -> None:
        """Raise `QueueFullError` where there is no room for so much sound: before work is put into it."""
        self._batcher.check(seconds)

    def prepare(self, prompt: str, clip: ReadClip) -> Pair:
        """What `judge` takes. Blocks for milliseconds; from any thread."""
        return prompt, self._model.prepare(clip.waveform, clip.sampling_rate)

    async def judge(self, pairs: Sequence[Pair]) -> list[float]:
        """Rewards of pairs: calibrated logits."""
        logits = await self._batcher.submit(pairs)
        # Here, not in the shared call: whoever was in it too is unaffected.
        if not all(map(math.isfinite, logits)):
            raise ValueError("the model made a reward that is not finite")
        return logits

    async def close(self) -> None:
        """Refuse what waits, finish what runs, end the thread."""
        await self._batcher.close()

    def _run(self, pairs: Sequence[Pair]) -> list[float]:
        logits_B = self._model.reward([prompt for prompt, _ in pairs], [clip for _, clip in pairs])
        logits: list[float] = logits_B.tolist()
        return logits

    def _set_threads(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)


def load(settings: RewardSettings, found: Mapping[str, ResolvedModel]) -> Judge:
    """Load the models that were resolved, by their names in `model_uris`.

    Raises:
        ModelError: one was refused, or they do not belong together.
        InvalidInputError: the device does not exist, or the CLAP model gives no tokens.
    """
    version, clap = found[REWARD.model], found[CLAP]
    with naming(CLAP):
        tokens = load_clap_model(clap, settings.device)
    return Judge(load_reward(version.folder, tokens, clap.digest), version, clap, settings)
