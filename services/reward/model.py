"""A loaded reward model that batches the pairs of concurrent calls.

Shapes: B pairs of a prompt and a clip.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.audio.decoding import ReadClip
from services.catalogue import REWARD
from services.errors import NotFiniteError
from services.models.reward.model import RewardClip, RewardModel, load_reward
from services.models.words import warnings_of
from services.reward.settings import CLAP, RewardSettings
from services.runtime.microbatching import batched
from services.weights.loading import load_clap_model
from services.weights.uri import ResolvedModel, naming

Pair = tuple[str, RewardClip]
"""A prompt, and a clip resampled and cut into windows for the model."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedClip:
    """A clip as the model takes it."""

    clip: RewardClip
    warnings: tuple[str, ...]
    """See `ReadClip.warnings`."""


class RewardScorer:
    """A reward model on a worker thread. Pairs of concurrent calls share batches."""

    def __init__(
        self, model: RewardModel, version: ResolvedModel, clap: ResolvedModel, settings: RewardSettings
    ) -> None:
        """Args:
        model: the reward model.
        version: its identity and folder.
        clap: identity of the CLAP model that it was trained on.
        settings: limits of batches and of the queue; CPU threads.
        """
        self.version, self.clap = version.identity, clap.identity
        self.folder = version.folder
        self.sampling_rate = model.clap.sampling_rate
        self._model = model
        self.batcher = batched(
            self._run, settings, cost=lambda pair: pair[1].windows_WS.numel() / model.clap.sampling_rate
        )
        """Of pairs; costs are seconds of audio, in whole windows."""

    def check(self, seconds: float) -> None:
        """Raise `QueueFullError` if `seconds` of audio don't fit into the queue. Call it before decoding."""
        self.batcher.check(seconds)

    def kept_bytes(self, seconds: float) -> int:
        """Return the size of a prepared clip of this length."""
        return 4 * self._model.window_count(seconds) * self._model.clap.window_samples

    def prepare(self, clip: ReadClip) -> PreparedClip:
        """Return a clip for `score`. Thread-safe; blocks for milliseconds."""
        prepared = self._model.prepare(clip.waveform, clip.sampling_rate)
        return PreparedClip(clip=prepared, warnings=clip.warnings)

    def prompt_warnings(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Return for each prompt what the model does not read of it: sentences that begin with ``prompt``."""
        return warnings_of({self.version.name: self._model.prompt_warnings}, prompts)

    def readable(self, prompts: Sequence[str]) -> list[bool]:
        """Return for each prompt whether the model knows a word for a sound in it."""
        known = {prompt: self._model.reads(prompt) for prompt in set(prompts)}
        return [known[prompt] for prompt in prompts]

    async def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Return the rewards of `pairs`: calibrated logits, in order.

        Raises:
            QueueFullError: the queue has no room for the pairs.
            NotFiniteError: a reward is not finite.
        """
        logits = await self.batcher.submit(pairs)
        # Checked per caller, not in the shared batch, so that other callers don't fail too.
        for index, logit in enumerate(logits):
            if not math.isfinite(logit):
                raise NotFiniteError.of(f"reward of clip {index}", self.version.digest)
        return logits

    def _run(self, pairs: Sequence[Pair]) -> list[float]:
        logits_B = self._model.reward([prompt for prompt, _ in pairs], [clip for _, clip in pairs])
        logits: list[float] = logits_B.tolist()
        return logits


def load(settings: RewardSettings, found: Mapping[str, ResolvedModel]) -> RewardScorer:
    """Load the reward model and its CLAP model.

    Args:
        settings: the service's settings.
        found: resolved models, keyed as `model_uris` keys them.

    Raises:
        ModelError: a model was refused, or the reward model was trained on another CLAP model.
        InvalidInputError: the device does not exist, or the CLAP model returns no tokens.
    """
    version, clap = found[REWARD.model], found[CLAP]
    with naming(CLAP):
        tokens = load_clap_model(clap, settings.device)
    return RewardScorer(load_reward(version.folder, tokens, clap.digest), version, clap, settings)
