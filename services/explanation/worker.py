"""An explainer on a worker thread: one call at a time, others wait in a short, fair queue."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from services.api.explanation import (
    Explainer,
    ExplainerModel,
    Explanation,
    ExplanationProgress,
    ExplanationRequest,
    Report,
)
from services.api.model import ModelVersion
from services.errors import RequestCancelledError
from services.explanation.settings import ExplanationSettings
from services.runtime import tracing
from services.runtime.microbatching import MicroBatcher, set_threads


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExplanationJob:
    """A request, and whom to report its progress to."""

    request: ExplanationRequest
    report: Report
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the answer any longer."""


class ExplanationWorker:
    """Runs the requests of concurrent calls one by one. Belongs to one event loop."""

    def __init__(
        self, explainer: Explainer, version: ModelVersion, folder: Path, settings: ExplanationSettings
    ) -> None:
        """Args:
        explainer: the model.
        version: its identity.
        folder: of its weights, for the log.
        settings: limits of the queue; CPU threads.
        """
        self.version, self.folder = version, folder
        description = explainer.description
        self.description: ExplainerModel = replace(
            description, generation=replace(description.generation, model=version)
        )
        self._explainer = explainer
        self.batcher: MicroBatcher[ExplanationJob, Explanation | None] = MicroBatcher(
            self._run,
            cost=lambda _: 1.0,
            max_cost=1.0,
            max_wait=0.0,
            max_queue_cost=settings.max_queue,
            max_run_seconds=settings.max_run_seconds,
            initialize=partial(set_threads, settings.threads),
        )
        """Of calls, each of cost 1 and a batch of its own."""

    async def explain(self, job: ExplanationJob) -> Explanation:
        """Return the explanation of a job. Raises `QueueFullError`. Cancelling it ends the job."""
        try:
            steps = job.request.generation.num_inference_steps
            with tracing.span("explain", steps=steps, model_digest=self.version.digest):
                (answer,) = await self.batcher.submit([job])
        except BaseException:
            job.cancelled.set()
            raise
        if answer is None:
            raise RequestCancelledError("the call was cancelled")
        return answer

    def _run(self, jobs: Sequence[ExplanationJob]) -> list[Explanation | None]:
        """Return the explanation of each job; None for a cancelled one, which is no fault of the model."""
        return [self._explain(job) for job in jobs]

    def _explain(self, job: ExplanationJob) -> Explanation | None:
        def report(progress: ExplanationProgress) -> None:
            if job.cancelled.is_set():
                raise RequestCancelledError("the call was cancelled")
            job.report(progress)

        try:
            return replace(self._explainer.explain(job.request, report), model=self.version)
        except RequestCancelledError:
            return None
