"""`Engine`: submit requests from any thread, receive events, close."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Unpack

from services.api.engine import EngineConfig
from services.api.generation import (
    Event,
    Failed,
    Finished,
    Generation,
    GenerationModel,
    GenerationOptions,
    GenerationRequest,
    Limits,
    Queued,
    collect,
    validate,
)
from services.api.model import UNVERSIONED, ModelVersion
from services.engine.admission import Admission
from services.engine.states import Handle, RequestState
from services.engine.stats import EngineStats, Meter
from services.engine.worker import Worker
from services.models.latent import LatentPipeline

# Bounds of `QueueFullError.retry_after` in seconds: neither a tight loop nor a wait that no caller accepts.
_RETRY_SOONEST, _RETRY_LATEST = 0.1, 60.0


class Engine:
    """Shares one device among many requests, step by step.

    A worker thread runs the model; nothing else may use `pipeline` meanwhile. Thread-safe. Use it as a
    context manager, or call `close`.
    """

    def __init__(
        self, pipeline: LatentPipeline, config: EngineConfig | None = None, model: ModelVersion = UNVERSIONED
    ) -> None:
        """Start the worker thread. `pipeline` must be on its device; `model` identifies its weights."""
        self.config = config or EngineConfig()
        self.pipeline = pipeline
        self.description = _describe(pipeline, self.config, model)
        self._admission = Admission(self.config.max_queue)
        self._meter = Meter()
        worker = Worker(pipeline, model, self.config, self._admission, self._meter)
        self._thread = threading.Thread(target=worker.run, name="engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> Limits:
        """Limits of a request."""
        return self.description.limits

    def request(
        self, prompt: str, *, preview_interval_steps: int = 0, **options: Unpack[GenerationOptions]
    ) -> GenerationRequest:
        """Return a complete request: None becomes the model's default, and a missing seed is drawn."""
        return GenerationRequest.of(
            prompt, self.description.defaults, preview_interval_steps=preview_interval_steps, **options
        )

    def submit(
        self,
        request: GenerationRequest,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
    ) -> Handle:
        """Queue `request` and return at once.

        `on_event` gets the events in the order that `services.api.generation` states: the first `Queued` on
        this thread before `submit` returns, all others on the worker thread, which it must not keep waiting.
        `deadline` is on the clock of `time.monotonic`.

        Raises `InvalidInputError`, `QueueFullError`, `ServiceUnavailableError`.
        """
        validate(request, self.limits)
        number, position = self._admission.reserve(request.clip_count, self._retry_after)
        state = RequestState(
            number=number,
            request=request,
            frames=self.pipeline.latent_frames(request.duration),
            position=position,
            on_event=on_event,
            deadline=deadline,
            wake=self._admission.wake,
        )
        try:
            on_event(Queued(position=position))
        except BaseException:
            state.cancelled = True
            raise
        finally:
            self._admission.enter(state)
        return Handle(state)

    def stream(self, request: GenerationRequest, *, deadline: float | None = None) -> Iterator[Event]:
        """Queue `request` at once; return an iterator over its events. The last is `Finished` or `Failed`.

        Closing the iterator cancels the request. Raises what `submit` raises.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        handle = self.submit(request, events.put, deadline=deadline)
        return _drain(events, handle)

    def generate(self, request: GenerationRequest, *, deadline: float | None = None) -> Generation:
        """Make the clips of `request`. Raises what `submit` raises, or the request's own error."""
        return collect(self.stream(request, deadline=deadline))

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, fail those that have not ended after `drain_seconds`, and stop the thread.

        Returns after at most `drain_seconds` and one more step or decode. Can be called twice.
        """
        self._admission.close(drain_seconds)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close without waiting for running requests."""
        self.close()

    @property
    def stats(self) -> EngineStats:
        """The engine's counts so far."""
        return replace(
            self._meter.totals, queue_depth=self._admission.depth, running=len(self._admission.states())
        )

    def _retry_after(self, waiting: int) -> float:
        """Estimate the seconds until there is room again, when the next queued clip has started."""
        states = self._admission.states()
        steps = sum(state.steps_total - state.steps_done for state in states)
        seconds = steps * (self._meter.step_seconds or 0.0) / max(waiting, 1)
        return min(max(seconds, _RETRY_SOONEST), _RETRY_LATEST)


def _drain(events: "queue.SimpleQueue[Event]", handle: Handle) -> Iterator[Event]:
    try:
        while True:
            event = events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return
    finally:
        handle.cancel()


def _describe(pipeline: LatentPipeline, config: EngineConfig, model: ModelVersion) -> GenerationModel:
    described = pipeline.description
    limits = replace(
        described.limits,
        max_prompt_characters=config.max_prompt_characters,
        max_clip_count=min(config.max_clip_count, config.max_queue),
    )
    return replace(described, model=model, limits=limits)
