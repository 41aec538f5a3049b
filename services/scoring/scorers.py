"""The scorers: CLAP models with their batches. Loading them, and asking several at once.

Shapes: B clips or prompts, D embedding width, W windows, S samples of a window.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.audio.clips import ReadClip
from services.errors import ModelError
from services.models.clap.model import EmbeddingModel, TextCache
from services.runtime.microbatching import BatchConfig, BatchStats, MicroBatcher
from services.scoring.settings import ScoringSettings, model_uris
from services.weights.loading import load_embedding_model
from services.weights.uri import ModelURI, ResolvedModel, resolve

Embedding = NDArray[np.float32]
"""[D], of length 1."""

MAX_TEXT_BATCH = 64
"""Prompts that are embedded in one pass."""

MAX_TEXT_QUEUE = 4_096
"""Prompts that may wait."""

Made = TypeVar("Made")


class Scorer:
    """A loaded model. Its audio side and its text side have a worker thread and batches each."""

    def __init__(self, model: EmbeddingModel, version: ResolvedModel, config: BatchConfig) -> None:
        self.version = version.identity
        self.sampling_rate, self.dimension = model.sampling_rate, model.dimension
        self._model, self._threads = model, config.threads
        self._audio: MicroBatcher[Tensor, Embedding] = MicroBatcher(
            lambda clips: list(model.embed_windows(clips).numpy()),
            cost=lambda windows: windows.numel() / model.sampling_rate,
            max_cost=config.max_batch_seconds,
            max_wait=config.max_wait_seconds,
            max_queue_cost=config.max_queue_seconds,
            initialize=self._set_threads,
        )
        self._text: MicroBatcher[str, Embedding] = MicroBatcher(
            lambda prompts: list(model.embed_text(prompts).numpy()),
            cost=lambda _: 1.0,
            max_cost=MAX_TEXT_BATCH,
            max_wait=config.max_wait_seconds,
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


def load_scorers(uris: Mapping[str, ModelURI], device: str, config: BatchConfig) -> dict[str, Scorer]:
    """Resolve and load every scorer, by name. Names of the same version share one.

    Raises:
        ModelError: one was not found, or refused; the message begins with its name.
        InvalidInputError: the device does not exist.
    """
    loaded: dict[ResolvedModel, Scorer] = {}
    scorers: dict[str, Scorer] = {}
    versions: dict[str, ResolvedModel] = {}
    # All are found before the first is loaded: a wrong one is known at once.
    for name, uri in uris.items():
        with _naming(name):
            versions[name] = resolve(uri)
    for name, version in versions.items():
        if version not in loaded:
            with _naming(name):
                loaded[version] = Scorer(load_embedding_model(version, device), version, config)
        scorers[name] = loaded[version]
    return scorers


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say in a refusal which scorer it is about."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"scorer {name}: {error}") from error


def load(settings: ScoringSettings) -> dict[str, Scorer]:
    """Load every scorer of the settings, by name."""
    config = BatchConfig(
        max_batch_seconds=settings.max_batch_seconds,
        max_wait_seconds=settings.max_wait_seconds,
        max_queue_seconds=settings.max_queue_seconds,
        threads=settings.threads,
    )
    return load_scorers(model_uris(settings.scorers), settings.device, config)


async def close(scorers: Mapping[str, Scorer]) -> None:
    """Close each scorer once."""
    for scorer in dict.fromkeys(scorers.values()):
        await scorer.close()
