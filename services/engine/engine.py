"""`Engine`: submit requests from any thread, receive events, close."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Final, Protocol, Unpack

from services.api.engine import EngineConfig
from services.api.generation import (
    Defaults,
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
    profile_fault,
    validate,
)
from services.api.measurements import Observer
from services.api.model import UNVERSIONED, ModelVersion
from services.engine.admission import Admission
from services.engine.pace import Pace
from services.engine.states import Handle, RequestState
from services.engine.stats import EngineStats, Meter
from services.engine.worker import Mark, Worker
from services.errors import invalid
from services.fairness import ANONYMOUS, Account, Path
from services.models.latent import LatentPipeline, guided_steps
from services.models.lora import Adapter

_CLOSE_SECONDS: Final = 30.0
"""Seconds that `Engine.close` waits for the present turn to end."""

_log = logging.getLogger(__name__)


class AdapterSource(Protocol):
    """Loads adapters by the names that requests give. Thread-safe."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that are listed."""

    def get(self, name: str) -> Adapter:
        """Return an adapter on the model's device. Raises as `Engine.load_adapter`."""


class Engine:
    """Shares one device among many requests, step by step.

    A worker thread runs the model; nothing else may use `pipeline` meanwhile. Thread-safe. Use it as a
    context manager, or call `close`.
    """

    def __init__(
        self,
        pipeline: LatentPipeline,
        config: EngineConfig | None = None,
        model: ModelVersion = UNVERSIONED,
        mark: Mark | None = None,
        adapters: AdapterSource | None = None,
    ) -> None:
        """Start the worker thread.

        `pipeline` must be on its device; `model` identifies its weights; `mark` embeds a watermark in clips.
        `adapters` loads the adapters that requests name; None: requests take none.
        """
        self.config = config or EngineConfig()
        self.pipeline = pipeline
        self._adapters = adapters
        self.description = _describe(pipeline, self.config, model, adapters)
        self._meter, self._pace = Meter(), Pace()
        defaults = self.description.defaults
        default_clip = partial(
            self._pace.clip,
            frames=pipeline.latent_frames(defaults.duration),
            rows=defaults.num_inference_steps + _guided(defaults, defaults.num_inference_steps, pipeline),
        )
        self._admission = Admission(self.config, self._pace, default_clip)
        self._worker = Worker(pipeline, model, self.config, self._admission, self._meter, self._pace, mark)
        self._thread = threading.Thread(target=self._worker.run, name="engine", daemon=True)
        self._thread.start()
        watched = (self._thread, self._worker, self.config.max_turn_seconds)
        threading.Thread(target=_watch, args=watched, name="engine-watchdog", daemon=True).start()

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
        account: Account = ANONYMOUS,
    ) -> Handle:
        """Queue `request` and return at once.

        `on_event` gets the events in the order that `services.api.generation` states: the first `Queued` on
        this thread before `submit` returns, all others on the worker thread, which it must not keep waiting.
        `deadline` is on the clock of `time.monotonic`. `account` is whose share of the device it uses.

        Raises `InvalidInputError`, `QueueFullError`, `DeadlineExceededError`, `ServiceUnavailableError`.
        """
        validate(request, self.limits)
        frames = self.pipeline.latent_frames(request.duration)
        asked = request.num_inference_steps
        steps = self.pipeline.steps(asked, request.duration)
        request = replace(request, num_inference_steps=steps)
        adapter = self.load_adapter(request.adapter) if request.adapter else None

        def make(path: Path) -> RequestState:
            return RequestState(
                path=path,
                request=request,
                asked_steps=None if asked == self.description.defaults.num_inference_steps else asked,
                frames=frames,
                guided_steps=_guided(request, steps, self.pipeline),
                on_event=on_event,
                deadline=deadline,
                wake=self._admission.wake,
                preview_interval=self._preview_interval(request),
                adapter=adapter,
            )

        left = None if deadline is None else deadline - time.monotonic()
        state = self._admission.reserve(make, account, left)
        try:
            on_event(Queued(position=state.position))
        except BaseException:
            state.cancelled = True
            raise
        finally:
            self._admission.enter(state)
        return Handle(state)

    def load_adapter(self, name: str) -> Adapter:
        """Return the adapter that a request names; it is loaded unless it is in memory.

        `submit` does it, too; call this first where the caller must not be kept waiting. Raises
        `InvalidInputError` (field ``adapter``) if there is none, or `ServiceUnavailableError` of a registry.
        """
        if self._adapters is None:
            raise invalid("adapter", f"is {name[:80]!r}, and this model takes no adapters; leave it out")
        return self._adapters.get(name)

    def check(self, account: Account) -> None:
        """Raise `QueueFullError` if any request of the account would be refused for want of room."""
        self._admission.check(account)

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

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Have `on_failure` called with the reason if the engine ends for good, or has ended already.

        It ends when its thread ends, when the device fails at every step, or when a turn takes more than
        `max_turn_seconds`. Its requests then fail, and new ones are refused. Called on any thread.
        """
        self._worker.watch(on_failure)

    def observe(self, observer: Observer) -> None:
        """Have `observer` called with each measurement from now on, on the worker thread."""
        self._meter.observe = observer

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, fail those that have not ended after `drain_seconds`, and stop the thread.

        Returns after at most `drain_seconds` and one more step or decode; half a minute if that hangs. Can be
        called twice.
        """
        self._admission.close(drain_seconds)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                _log.error("the engine's thread hangs; it is left behind")

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
            self._meter.totals,
            queue_depth=self._admission.depth,
            running=len(self._admission.states()),
        )

    def _preview_interval(self, request: GenerationRequest) -> int:
        """Return the least multiple of the interval that was asked for with no more than `max_previews`."""
        every = request.preview_interval_steps
        if not every:
            return 0
        previews = request.num_inference_steps // every
        return every * max(1, -(-previews // self.config.max_previews))


def _guided(options: Defaults | GenerationRequest, steps: int, pipeline: LatentPipeline) -> int:
    return guided_steps(options.guidance_scale, options.guidance_stop, steps, folded=pipeline.folds_guidance)


def _watch(thread: threading.Thread, worker: Worker, limit: float) -> None:
    """Fail the engine if a turn of its worker takes more than `limit` seconds, until its thread ends."""
    while thread.is_alive():
        thread.join(min(1.0, limit / 4))
        began = worker.turn_began
        if began is not None and time.monotonic() - began > limit:
            worker.fail(f"the engine hangs: a turn takes more than {limit:g} s")
            return


def _drain(events: "queue.SimpleQueue[Event]", handle: Handle) -> Iterator[Event]:
    try:
        while True:
            event = events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return
    finally:
        handle.cancel()


def _describe(
    pipeline: LatentPipeline, config: EngineConfig, model: ModelVersion, adapters: AdapterSource | None
) -> GenerationModel:
    described = pipeline.description
    fault = profile_fault(config.profile, described.limits.profiles)
    if fault is not None:
        raise invalid("profile", fault)
    limits = replace(
        described.limits,
        max_prompt_characters=config.max_prompt_characters,
        max_clip_count=min(config.max_clip_count, config.max_queue),
        adapters=() if adapters is None else adapters.names,
    )
    defaults = described.defaults.under(config.profile)
    return replace(described, model=model, limits=limits, defaults=defaults)
