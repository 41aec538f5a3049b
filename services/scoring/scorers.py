"""The scorers: CLAP models with their batches. Loading them, and asking several at once.

Shapes: B clips or prompts, D embedding width, W windows, S samples of a window.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.audio.clips import ReadClip
from services.models.clap.model import EmbeddingModel, TextCache
from services.runtime.microbatching import BatchStats, MicroBatcher
from services.runtime.settings import BatchedSettings
from services.scoring.settings import ScoringSettings
from services.weights.loading import load_embedding_model
from services.weights.uri import ResolvedModel, naming

Embedding = NDArray[np.float32]
"""[D], of length 1."""

MAX_TEXT_BATCH = 64
"""Prompts that are embedded in one pass."""

MAX_TEXT_QUEUE = 4_096
"""Prompts that may wait."""

Made = TypeVar("Made")


class Scorer:
    """A loaded model. Its audio side and its text side have a worker thread and batches each."""

    def __init__(self, model: EmbeddingModel, version: ResolvedModel, settings: BatchedSettings) -> None:
        self.version = version.identity
        self.sampling_rate, self.dimension = model.sampling_rate, model.dimension
        self._model, self._threads = model, settings.threads
        self._audio: MicroBatcher[Tensor, Embedding] = MicroBatcher(
            lambda clips: list(model.embed_windows(clips).numpy()),
            cost=lambda windows: windows.numel() / model.sampling_rate,
            max_cost=settings.max_batch_seconds,
            max_wait=settings.max_wait_seconds,
            max_queue_cost=settings.max_queue_seconds,
            initialize=self._set_threads,
        )
        self._text: MicroBatcher[str, Embedding] = MicroBatcher(
            lambda prompts: list(model.embed_text(prompts).numpy()),
            cost=lambda _: 1.0,
            max_cost=MAX_TEXT_BATCH,
            max_wait=settings.max_wait_seconds,
            max_queue_cost=MAX_TEXT_QUEUE,
            initialize=self._set_threads,
        )

    @property
    def audio_stats(self) -> BatchStats:
        """Of the audio side; costs are seconds of windows."""
        return self._audio.stats

    @property
    def text_stats(self) -> BatchStats:
        """Of the text side; costs are prompts."""
        return self._text.stats

    @property
    def cache(self) -> TextCache:
        """The embeddings of prompts that are kept."""
        return self._model.cache

    def check(self, seconds: float = 0.0) -> None:
        """Raise `QueueFullError` where there is no room for so much sound: before work is put into it."""
        self._audio.check(seconds)

    def prepare(self, clip: ReadClip) -> Tensor:
        """The windows [W, S] that the model hears. Blocks for milliseconds; from any thread."""
        return self._model.prepare(clip.waveform, clip.sampling_rate)

    async def embed_audio(self, clips: Sequence[Tensor]) -> NDArray[np.float32]:
        """Embeddings [B, D] of prepared clips."""
        return _finite(np.stack(await self._audio.submit(clips)))

    async def embed_text(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [B, D] of sentences; equal ones are embedded once."""
        unique = list(dict.fromkeys(prompts))
        made = dict(zip(unique, await self._text.submit(unique), strict=True))
        return _finite(np.stack([made[prompt] for prompt in prompts]))

    async def close(self) -> None:
        """Refuse what waits, finish what runs, end the threads."""
        await asyncio.gather(self._audio.close(), self._text.close())

    def _set_threads(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)


@dataclass(frozen=True, slots=True)
class Panel:
    """The scorers of one call, by name, in the order of the answer. Two names may mean one scorer."""

    members: Mapping[str, Scorer]

    def check(self) -> None:
        """Raise `QueueFullError` where one of them has no room."""
        for scorer in self._distinct():
            scorer.check()

    def prepare(self, clips: Sequence[ReadClip]) -> dict[Scorer, list[Tensor]]:
        """The clips as each scorer hears them. Raises `QueueFullError` where one of them has no room."""
        prepared: dict[Scorer, list[Tensor]] = {scorer: [] for scorer in self._distinct()}
        for scorer in prepared:
            scorer.check(sum(clip.seconds for clip in clips))
        for clip in clips:
            for scorer, heard in prepared.items():
                heard.append(scorer.prepare(clip))
        return prepared

    async def embed_audio(self, prepared: Mapping[Scorer, Sequence[Tensor]]) -> list[NDArray[np.float32]]:
        """Embeddings [B, D] by each member."""
        made = await together(*(scorer.embed_audio(clips) for scorer, clips in prepared.items()))
        return self._by_member(dict(zip(prepared, made, strict=True)))

    async def embed_text(self, prompts: Sequence[str]) -> list[NDArray[np.float32]]:
        """Embeddings [B, D] by each member."""
        scorers = self._distinct()
        made = await together(*(scorer.embed_text(prompts) for scorer in scorers))
        return self._by_member(dict(zip(scorers, made, strict=True)))

    def _distinct(self) -> list[Scorer]:
        return list(dict.fromkeys(self.members.values()))

    def _by_member(self, made: Mapping[Scorer, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        return [made[scorer] for scorer in self.members.values()]


def _finite(embeddings_BD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Refuse a caller's own embeddings where the model failed: the others of its batch are unaffected."""
    if not np.isfinite(embeddings_BD).all():
        raise ValueError("the model made an embedding that is not finite")
    return embeddings_BD


async def together(*coroutines: Coroutine[Any, Any, Made]) -> list[Made]:
    """Run coroutines side by side. As soon as one fails, or the caller is cancelled, all of them end."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def load(settings: ScoringSettings, found: Mapping[str, ResolvedModel]) -> dict[str, Scorer]:
    """Load every scorer of which the weights were resolved, by name. Names of the same weights share one.

    Raises:
        ModelError: one was refused; the message begins with its name.
        InvalidInputError: the device does not exist.
    """
    loaded: dict[ResolvedModel, Scorer] = {}
    for name, version in found.items():
        if version not in loaded:
            with naming(f"scorer {name}"):
                model = load_embedding_model(version, settings.device)
                loaded[version] = Scorer(model, version, settings)
    return {name: loaded[version] for name, version in found.items()}
