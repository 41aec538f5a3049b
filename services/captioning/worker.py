"""A captioner on a worker thread: clips of concurrent calls share its batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.api.captioning import CaptionRequest
from services.audio.decoding import ReadClip
from services.captioning.model import CaptionJob, CaptionModel, Draft, PreparedClip
from services.captioning.settings import CaptioningSettings
from services.runtime import tracing
from services.runtime.microbatching import batched


class CaptionWorker:
    """Batches the clips of concurrent calls, of any options. Belongs to one event loop."""

    def __init__(self, model: CaptionModel, folder: Path, settings: CaptioningSettings) -> None:
        """Args:
        model: the models.
        folder: of the captioner's weights, for the log.
        settings: limits of batches and of the queue; CPU threads.
        """
        self.model, self.folder = model, folder
        self.batcher = batched(
            model.describe, settings, cost=lambda job: model.cost(job.prepared.seconds, job.request)
        )
        """Of clips; costs are as `CaptionModel.cost` counts them."""

    async def describe(self, clips: Sequence[PreparedClip], request: CaptionRequest) -> list[Draft]:
        """Return the candidates of each clip. Raises `QueueFullError`."""
        with tracing.span("caption", clips=len(clips), model_digest=self.model.version.digest):
            return await self.batcher.submit([CaptionJob(prepared=one, request=request) for one in clips])


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPreparation:
    """What the service makes of the clips of one call."""

    worker: CaptionWorker
    request: CaptionRequest

    def check(self, seconds: float) -> None:
        """Raise `QueueFullError` if the queue has no room for seconds of sound."""
        self.worker.batcher.check(self.worker.model.cost(seconds, self.request))

    def kept_bytes(self, seconds: float) -> int:
        """Return the size of what is kept of a clip of this length."""
        return self.worker.model.kept_bytes(seconds, self.request)

    def prepare(self, clip: ReadClip) -> PreparedClip:
        """Return what is kept of a clip."""
        return self.worker.model.prepare(clip, self.request)
