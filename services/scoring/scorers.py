"""Loaded CLAP models that batch the clips and prompts of concurrent calls.

Shapes: B clips or prompts, D embedding width, W windows, S samples of a window.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.audio.decoding import ReadClip
from services.errors import NotFiniteError, QueueFullError
from services.models.clap.model import EmbeddingModel, TextCache
from services.models.words import warnings_of
from services.runtime import tracing
from services.runtime.microbatching import MicroBatcher, batched, set_threads
from services.runtime.settings import BatchedSettings
from services.scoring.settings import ScoringSettings
from services.weights.loading import load_embedding_model
from services.weights.uri import ResolvedModel, naming

Embedding = NDArray[np.float32]
"""[D], of unit length."""

MAX_TEXT_BATCH = 64
"""Maximum number of prompts in one batch."""

MAX_TEXT_QUEUE = 4_096
"""Maximum number of prompts in the queue of a scorer."""

Result = TypeVar("Result")


class Scorer:
    """A CLAP model with one worker thread and one batcher for audio, and one of each for text."""

    def __init__(self, model: EmbeddingModel, version: ResolvedModel, settings: BatchedSettings) -> None:
        self.version = version.identity
        self.sampling_rate, self.dimension = model.sampling_rate, model.dimension
        self._model = model
        self.audio: MicroBatcher[Tensor, Embedding] = batched(
            lambda clips: list(model.embed_windows(clips).numpy()),
            settings,
            cost=lambda windows: windows.numel() / model.sampling_rate,
        )
        """Of windows of clips; costs are seconds of audio."""
        self.text: MicroBatcher[str, Embedding] = MicroBatcher(
            lambda prompts: list(model.embed_text(prompts).numpy()),
            cost=lambda _: 1.0,
            max_cost=MAX_TEXT_BATCH,
            max_wait=settings.max_wait_seconds,
            max_queue_cost=MAX_TEXT_QUEUE,
            max_run_seconds=settings.max_batch_run_seconds,
            initialize=partial(set_threads, settings.threads),
        )
        """Of prompts, each of which costs 1."""

    @property
    def cache(self) -> TextCache:
        """Return the cache of text embeddings."""
        return self._model.cache

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Have `on_failure` called with a reason when the model can't work any longer."""
        for encoder, batcher in (("audio", self.audio), ("text", self.text)):
            batcher.watch(partial(_report, on_failure, f"{encoder} encoder of {self.version.name}"))

    def window_bytes(self, seconds: float) -> int:
        """Return the size of the windows of a clip of this length."""
        windows = max(1, math.ceil(seconds * self.sampling_rate / self._model.window_samples))
        return 4 * windows * self._model.window_samples

    def prepare(self, clip: ReadClip) -> Tensor:
        """Return the windows [W, S] of a clip for `embed_audio`. Thread-safe; blocks for milliseconds."""
        return self._model.prepare(clip.waveform, clip.sampling_rate)

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`: sentences that begin with ``prompt``."""
        return self._model.prompt_warnings(prompt)

    def reads(self, prompt: str) -> bool:
        """Return whether the model knows a word for a sound in `prompt`."""
        return self._model.reads(prompt)

    async def embed_audio(self, clips: Sequence[Tensor]) -> NDArray[np.float32]:
        """Return the embeddings [B, D] of prepared clips. Raises `QueueFullError`."""
        with tracing.span("embed_audio", clips=len(clips), model_digest=self.version.digest):
            return self._finite("clip", np.stack(await self.audio.submit(clips)))

    async def embed_text(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Return the embeddings [B, D] of prompts; equal ones are embedded once. Raises `QueueFullError`."""
        unique = list(dict.fromkeys(prompts))
        with tracing.span("embed_text", prompts=len(unique), model_digest=self.version.digest):
            embeddings = dict(zip(unique, await self.text.submit(unique), strict=True))
            return self._finite("prompt", np.stack([embeddings[prompt] for prompt in prompts]))

    async def close(self) -> None:
        """Refuse queued items, finish the running batches and stop the worker threads."""
        await asyncio.gather(self.audio.close(), self.text.close())

    def _finite(self, kind: str, embeddings_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return one caller's embeddings. Raises `NotFiniteError`; other callers get theirs."""
        finite_B = np.isfinite(embeddings_BD).all(-1)
        if not finite_B.all():
            raise NotFiniteError.of(f"embedding of {kind} {finite_B.argmin()}", self.version.digest)
        return embeddings_BD


def _report(on_failure: Callable[[str], None], part: str, reason: str) -> None:
    on_failure(f"{part}: {reason}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedClip:
    """A clip as scorers take it."""

    windows: Mapping[Scorer, Tensor]
    """[W, S] by scorer."""
    warnings: Sequence[str]
    """See `ReadClip.warnings`."""


@dataclass(frozen=True, slots=True)
class ScorerGroup:
    """The scorers of one call, by name, in the order of the response. Two names may share one scorer."""

    members: Mapping[str, Scorer]

    def check(self, seconds: float) -> None:
        """Raise `QueueFullError` if `seconds` of audio don't fit into the queue of any scorer."""
        for scorer in self._distinct():
            scorer.audio.check(seconds)

    @contextmanager
    def expect(self, clips: int, *, any_of_them: bool = False) -> Iterator[None]:
        """Count clips as waiting for each scorer while they are received and decoded.

        Raises `QueueFullError` if a scorer refuses them; with `any_of_them`, if every scorer does.
        """
        scorers, refusals = self._distinct(), []
        with ExitStack() as stack:
            for scorer in scorers:
                try:
                    stack.enter_context(scorer.audio.expect(clips))
                except QueueFullError as error:
                    refusals.append(error)
            if refusals and (len(refusals) == len(scorers) or not any_of_them):
                raise refusals[0]
            yield

    def kept_bytes(self, seconds: float) -> int:
        """Return the size of the windows of a clip of this length, for all scorers."""
        return sum(scorer.window_bytes(seconds) for scorer in self._distinct())

    def prompt_warnings(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Return for each prompt what the scorers do not read of it, as `warnings_of`."""
        return warnings_of({name: one.prompt_warnings for name, one in self.members.items()}, prompts)

    def readable(self, prompts: Sequence[str]) -> NDArray[np.bool_]:
        """Return whether each prompt has a word for a sound that the scorer knows: [B, P] by member."""
        known = {prompt: [one.reads(prompt) for one in self.members.values()] for prompt in set(prompts)}
        return np.array([known[prompt] for prompt in prompts])

    def prepare(self, clip: ReadClip) -> PreparedClip:
        """Return the windows of a clip for each scorer."""
        windows = {scorer: scorer.prepare(clip) for scorer in self._distinct()}
        return PreparedClip(windows=windows, warnings=clip.warnings)

    async def embed_audio(self, clips: Sequence[PreparedClip]) -> list[NDArray[np.float32]]:
        """Return embeddings [B, D], one array per member."""
        scorers = self._distinct()
        results = await gather_or_cancel(
            *(scorer.embed_audio([clip.windows[scorer] for clip in clips]) for scorer in scorers)
        )
        return self._by_member(dict(zip(scorers, results, strict=True)))

    async def embed_text(self, prompts: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return embeddings [B, D], one array per member."""
        scorers = self._distinct()
        results = await gather_or_cancel(*(scorer.embed_text(prompts) for scorer in scorers))
        return self._by_member(dict(zip(scorers, results, strict=True)))

    def _distinct(self) -> list[Scorer]:
        return list(dict.fromkeys(self.members.values()))

    def _by_member(self, results: Mapping[Scorer, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        return [results[scorer] for scorer in self.members.values()]


async def gather_or_cancel(*coroutines: Coroutine[Any, Any, Result]) -> list[Result]:
    """Run coroutines concurrently. If one fails, or the caller is cancelled, cancel the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def load(settings: ScoringSettings, found: Mapping[str, ResolvedModel]) -> dict[str, Scorer]:
    """Return a scorer for each resolved model, by name. Names with the same weights share one scorer.

    Raises:
        ModelError: a model was refused; the message begins with the scorer's name.
        InvalidInputError: the device does not exist.
    """
    loaded: dict[ResolvedModel, Scorer] = {}
    for name, version in found.items():
        if version not in loaded:
            with naming(f"scorer {name}"):
                model = load_embedding_model(version, settings.device)
                loaded[version] = Scorer(model, version, settings)
    return {name: loaded[version] for name, version in found.items()}
