"""A captioner on a worker thread: clips of concurrent calls share its batches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from services.api.captioning import CaptionRequest
from services.api.measurements import Observer
from services.audio.decoding import ReadClip
from services.captioning.model import CaptionJob, CaptionModel, Draft, PreparedClip
from services.captioning.settings import CaptioningSettings
from services.runtime import tracing
from services.runtime.callers import Caller
from services.runtime.microbatching import BatchStats, MicroBatcher


class CaptionWorker:
    """Batches the clips of concurrent calls, of any options. Belongs to one event loop."""

    def __init__(self, model: CaptionModel, folder: Path, settings: CaptioningSettings) -> None:
        """Args:
        model: the models.
        folder: of the captioner's weights, for the log.
        settings: limits of batches and of the queue; CPU threads.
        """
        self.model, self.folder = model, folder
        self._threads = settings.threads
        self._batcher: MicroBatcher[CaptionJob, Draft] = MicroBatcher(
            model.describe,
            cost=lambda job: model.cost(job.prepared.seconds, job.request),
            max_cost=settings.max_batch_seconds,
            max_wait=settings.max_wait_seconds,
            max_queue_cost=settings.max_queue_seconds,
            max_run_seconds=settings.max_batch_run_seconds,
            initialize=self._set_threads,
        )

    @property
    def stats(self) -> BatchStats:
        """Return the batcher's counts; costs are seconds of audio, as `CaptionModel.cost` counts them."""
        return self._batcher.stats

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Have `on_failure` called with a reason when the model can't work any longer."""
        self._batcher.watch(on_failure)

    def observe(self, observer: Observer) -> None:
        """Have `observer` called with each measurement of the queue and of the model from now on."""
        self._batcher.observe = observer

    def check(self, cost: float) -> None:
        """Raise `QueueFullError` if clips of a cost don't fit into the queue. Call it before decoding."""
        self._batcher.check(cost)

    def check_items(self, clips: int, caller: Caller) -> None:
        """Raise `QueueFullError` if the queue has no room, or not the time, for clips of a caller."""
        self._batcher.check_items(clips, caller)

    def expect(self, clips: int) -> AbstractContextManager[None]:
        """Return a context that counts clips as waiting while they are decoded. Raises `QueueFullError`."""
        return self._batcher.expect(clips)

    async def describe(self, clips: Sequence[PreparedClip], request: CaptionRequest) -> list[Draft]:
        """Return the candidates of each clip. Raises `QueueFullError`."""
        with tracing.span("caption", clips=len(clips), model_digest=self.model.version.digest):
            return await self._batcher.submit([CaptionJob(prepared=one, request=request) for one in clips])

    async def close(self) -> None:
        """Refuse queued clips, finish the running batch and stop the worker thread."""
        await self._batcher.close()

    def _set_threads(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPreparation:
    """What the service makes of the clips of one call."""

    worker: CaptionWorker
    request: CaptionRequest

    def check(self, seconds: float) -> None:
        """Raise `QueueFullError` if the queue has no room for seconds of sound."""
        self.worker.check(self.worker.model.cost(seconds, self.request))

    def kept_bytes(self, seconds: float) -> int:
        """Return the size of what is kept of a clip of this length."""
        return self.worker.model.kept_bytes(seconds, self.request)

    def prepare(self, clip: ReadClip) -> PreparedClip:
        """Return what is kept of a clip."""
        return self.worker.model.prepare(clip, self.request)
