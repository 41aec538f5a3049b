"""The worker thread's loop: between denoiser calls, clips start, end and are decoded.

Shapes: T mel frames, M mel bins, N samples.
"""

import logging
import time
from collections.abc import Callable, Sequence, Set

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.api.engine import EngineConfig
from services.api.generation import Clip, Event, Failed, Finished, Preview, Queued, quantise_mel
from services.api.model import ModelVersion
from services.audio.levels import is_silent
from services.engine.admission import Admission
from services.engine.batching import row_shapes, spare_rows
from services.engine.denoiser import Denoiser
from services.engine.pace import SLACK, Pace
from services.engine.prompts import PromptCache
from services.engine.states import ClipState, GroupKey, RequestState, Stage
from services.engine.stats import Meter
from services.errors import (
    DeadlineExceededError,
    MilongaError,
    NotFiniteError,
    RequestCancelledError,
    ServiceUnavailableError,
    TooLargeError,
)
from services.fairness import Rank
from services.models.latent import LatentPipeline, clip_generator

_log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""Faults of the model without a clip in between, after which the engine makes a trial clip."""

_HOPELESS = 0.9
"""A request is dropped when it takes at least the time to its deadline divided by this."""


Mark = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Embeds a watermark in a clip [N] within [-1, 1]."""


class Worker:
    """Runs the requests of an engine on the worker thread."""

    def __init__(
        self,
        pipeline: LatentPipeline,
        model: ModelVersion,
        config: EngineConfig,
        admission: Admission,
        meter: Meter,
        pace: Pace,
        mark: Mark | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._mark = mark
        self._model = model
        self._config = config
        self._admission = admission
        self._meter = meter
        self._pace = pace
        self._watchers: list[Callable[[str], None]] = []
        self._sampling_rate = pipeline.description.geometry.sampling_rate
        self._prompts = PromptCache(pipeline, config.prompt_cache_size)
        self._shapes = row_shapes(config.batch_shapes)
        self._denoiser = Denoiser(pipeline, self._shapes, exact=config.exact)
        self._places: dict[int, int] = {}
        """Most clips in a call by latent frames, after the device's memory ran out; kept until it is idle."""
        self._faults = 0
        self._decode_seconds = 0.0
        """Seconds of decodes before the next step: those of the last one, so that clips that end together do
        not hold up the steps of others. One decode may take longer."""
        self.turn_began: float | None = None
        """When the present turn began, on the clock of `time.monotonic`; None between turns."""
        self.failure: str | None = None
        """Why the worker ended for good."""

    def run(self) -> None:
        """Work until the admission is closed and all requests have ended. No request can end it early."""
        try:
            if self._config.threads is not None:
                torch.set_num_threads(self._config.threads)
            with torch.inference_mode():
                while self._admission.wait_for_work() and self.failure is None:
                    self.turn_began = time.monotonic()
                    self._turn()
                    self.turn_began = None
        except BaseException as error:
            _log.critical("the engine's thread ended", exc_info=error)
            self.fail(f"the engine failed: {type(error).__name__}")

    def fail(self, reason: str) -> None:
        """End the engine: fail all requests, and refuse new ones. Any thread may call it."""
        if self.failure is not None:
            return
        self.failure = reason
        self._admission.abort(reason, failed=True)
        for state in self._admission.states():
            self._end(state, Failed(error=ServiceUnavailableError(reason)))
        for on_failure in self._watchers:
            on_failure(reason)

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Call `on_failure` with the reason if the worker ends for good, or has ended already."""
        self._watchers.append(on_failure)
        if self.failure is not None:
            on_failure(self.failure)

    def _turn(self) -> None:
        """Do the next work: decode a clip, or run a denoising step with the clips that share one."""
        began = time.monotonic()
        try:
            self._reap()
            order = self._admission.order()
            to_step = [(rank, state) for rank, state in order if state.steps_ahead]
            if order and order[0][1].stepped and not (to_step and self._decode_seconds < 0):
                self._finish_clip(order[0][1].stepped.popleft())
            elif to_step:
                clips, paying = self._choose(to_step)
                if clips:
                    self._step(clips, paying, began)
            if not self._admission.states():
                self._denoiser.forget()
                self._places.clear()  # what took the memory may be gone
        except Exception as error:
            _log.exception("a turn of the engine failed; all its requests are failed with it")
            for state in self._admission.states():
                self._end(state, Failed(error=error))
            self._count_fault()

    def _count_fault(self) -> None:
        """Count a fault of the model; after several, end the engine if it can't make a trial clip either."""
        self._faults += 1
        if self._faults < MAX_FAULTS:
            return
        self._faults = 0
        try:
            self._try_out()
        except Exception as error:
            _log.critical("the device fails at every request", exc_info=error)
            self.fail(f"the device fails at every request: {type(error).__name__}")

    def _try_out(self) -> None:
        """Run a denoising step and a decode of the shortest duration. Raises what they raise."""
        duration = self._pipeline.description.limits.min_duration
        latents_1X = self._pipeline.noise(duration, clip_generator(0, 0))
        ones_1 = torch.ones(1, device=latents_1X.device)
        conditioning = self._prompts.encode("").conditioning
        latents_1X = self._pipeline.predict(latents_1X, ones_1, conditioning, duration * ones_1)
        self._pipeline.decode(latents_1X, round(duration * self._sampling_rate))

    # --------------------------------------------------------------------------------------------- who leaves

    def _reap(self) -> None:
        """End requests that are cancelled or expired, or all of them if the engine is aborting."""
        states = self._admission.states()
        left = len(states)
        for state in states:
            error = self._verdict(state, last=left == 1)
            if error is not None:
                self._end(state, Failed(error=error))
                left -= 1

    def _verdict(self, state: RequestState, *, last: bool) -> Exception | None:
        """Return the error that must end a request now; None if it may continue.

        The `last` one is tried until its deadline: estimates may be wrong.
        """
        if state.cancelled:
            return RequestCancelledError("the request was cancelled")
        done = f"after {state.steps_done} of {state.steps_total} steps"
        if state.expired:
            return DeadlineExceededError(f"the deadline passed {done}; allow more time or take fewer steps")
        if state.deadline is not None and not last:
            left = state.deadline - time.monotonic()
            if _HOPELESS * (shortest := self._pace.shortest(state)) > left:
                return DeadlineExceededError(
                    f"{done} the request takes {shortest:.1f} s more, and its deadline is in {left:.1f} s; "
                    "allow more time or take fewer steps"
                )
        if self._admission.aborting is not None:
            return ServiceUnavailableError(self._admission.aborting)
        return None

    def _end(self, state: RequestState, event: Finished | Failed) -> None:
        """Send a request its last event, and remove it."""
        # Before the event: its receiver may read the queue or submit another request at once.
        if not self._admission.remove(state):
            return
        state.ended = True
        if state.started_at is None:
            self._observe_wait(state)
        self._meter.count_end(event)
        self._send(state, event)
        state.done.set()

    def _fail(self, state: RequestState, error: Exception) -> None:
        _log.error("request %d failed", state.path.number, exc_info=error)
        if out_of_memory(error):
            error = TooLargeError(
                "the device's memory does not hold the request; take a shorter duration, or try again later"
            )
        self._end(state, Failed(error=error))
        if not isinstance(error, MilongaError):
            self._count_fault()

    def _send(self, state: RequestState, event: Event) -> None:
        """Send an event. A callback that raises loses its request, and nothing else."""
        try:
            state.on_event(event)
        except Exception:
            _log.exception("the callback of request %d failed; the request is cancelled", state.path.number)
            state.cancelled = True

    # ---------------------------------------------------------------------------------------------- who joins

    def _choose(self, order: Sequence[tuple[Rank, RequestState]]) -> tuple[list[ClipState], set[int]]:
        """Return the clips of the next denoiser call, and the numbers of the requests whose turn it is.

        Clips of others join if they hardly slow the call down, at no charge. Clips start when they are first
        chosen.
        """
        first, leader = order[0]
        places = self._places.get(leader.frames, self._config.batch_shapes[-1])
        chosen: list[ClipState] = []
        paying: set[int] = set()
        rows, limit = 0, self._shapes[-1]
        started = joining = False
        for rank, state in order:
            if state.frames != leader.frames:
                continue
            if rank.level != first.level and not joining:
                joining = True
                limit = limit if self._config.exact else self._spare_rows(leader.frames, rows)
            if joining and state.preview_interval:  # previews are not free
                continue
            fits = min(places - len(chosen), (limit - rows) // state.rows)
            if not fits or not self._encode(state):
                continue
            if chosen and state.text_length != chosen[0].state.text_length:
                continue
            if not joining:
                paying.add(state.path.number)
            clips = self._runnable(state, fits)
            started = started or any(not clip.step for clip in clips)
            chosen += clips
            rows += sum(clip.rows for clip in clips)
            limit = max(rows, min(limit, self._rows_within(state)))
        if started:
            self._report_positions(order)
        return chosen, paying

    def _rows_within(self, state: RequestState) -> int:
        """Return the rows of the largest call with which a request still meets its deadline."""
        if state.deadline is None or self._config.exact:
            return self._shapes[-1]
        slack = self._pace.slack(state, SLACK * (state.deadline - time.monotonic()))
        return max((rows for rows in self._shapes if self._pace.step(state.frames, rows) <= slack), default=0)

    def _spare_rows(self, frames: int, rows: int) -> int:
        return spare_rows(rows, self._shapes, lambda count: self._pace.step(frames, count))

    def _runnable(self, state: RequestState, count: int) -> list[ClipState]:
        """Return up to `count` of a request's clips that have steps to go, and start further clips."""
        try:
            while len(state.stepping) < count and state.clips_started < state.request.clip_count:
                state.stepping.append(ClipState(self._pipeline, state, state.clips_started))
                state.clips_started += 1
        except Exception as error:
            self._fail(state, error)
            return []
        return state.stepping[:count]

    def _encode(self, state: RequestState) -> bool:
        """Encode the prompts of a request that starts; return whether it can run."""
        if state.started_at is not None:
            return not state.ended
        state.started_at = time.monotonic()
        self._observe_wait(state)
        try:
            state.prompt = self._prompts.encode(state.request.prompt)
            state.negative_prompt = self._prompts.encode(state.request.negative_prompt)
        except Exception as error:
            self._fail(state, error)
            return False
        state.encode_seconds = time.monotonic() - state.started_at
        return True

    def _observe_wait(self, state: RequestState) -> None:
        self._meter.observe("queue_wait", time.monotonic() - state.submitted_at, state.path.priority)

    def _report_positions(self, order: Sequence[tuple[Rank, RequestState]]) -> None:
        """Send requests without a started clip their position among them, if it changed."""
        waiting = [state for _, state in order if not state.clips_started and not state.ended]
        for position, state in enumerate(waiting):
            if state.position != position:
                state.position = position
                self._send(state, Queued(position=position))

    # ----------------------------------------------------------------------------------------------- who runs

    def _step(self, clips: Sequence[ClipState], paying: Set[int], began: float) -> None:
        """Run one denoising step with `clips`; charge it to the requests with the numbers `paying`."""
        first_clips = _first_clips(clips)
        now = time.monotonic()
        for clip in first_clips:
            clip.state.first_step_at = clip.state.first_step_at or now
        frames = clips[0].state.frames
        done, rows = self._predict(GroupKey(frames, clips[0].state.text_length), clips)
        used = [clip.rows for clip, _ in done]  # before they advance
        for clip, output_1X in done:
            try:
                clip.advance(output_1X)
            except Exception as error:
                self._fail(clip.state, error)
        if not done:
            return
        now = time.monotonic()
        self._decode_seconds = now - began
        self._pace.add_step(frames, rows, now - began)
        self._meter.count_step(clips=len(done), used=sum(used), rows=rows, seconds=now - began)
        for (clip, _), own in zip(done, used, strict=True):
            state = clip.state
            if not state.steps_done:
                self._meter.observe("first_step", now - state.submitted_at, state.path.priority)
            state.steps_done += 1
            state.last_step_at = now
            if clip.finished:
                state.stepping.remove(clip)
                state.stepped.append(clip)
            if state.path.number in paying:
                self._admission.charge(state, frames * own)
        decode = self._pace.decode(frames)
        for clip in first_clips:
            clip.state.calls += 1
            clip.state.clips_in_calls += len(done)
            if not clip.state.ended:
                self._send(clip.state, clip.state.progress(clip.index, clip.step, decode))
        self._send_previews(first_clips)

    def _predict(
        self, key: GroupKey, clips: Sequence[ClipState]
    ) -> tuple[list[tuple[ClipState, Tensor]], int]:
        """Return the clips with their outputs [1, X], and the rows that it took.

        A call that fails is repeated in halves, so that only the request fails that it fails with. After it
        ran out of memory, later calls are smaller.
        """
        try:
            outputs, rows = self._denoiser(key, clips)
        except Exception as error:
            if len(clips) == 1:
                self._fail(clips[0].state, error)
                return [], 0
            half = len(clips) // 2
            if out_of_memory(error):
                _log.warning("no memory for %d clips of %d frames; trying fewer", len(clips), key.frames)
                self._places[key.frames] = half
                self._denoiser.free()
            first, rows = self._predict(key, clips[:half])
            left = [clip for clip in clips[half:] if not clip.state.ended]
            second, more_rows = self._predict(key, left) if left else ([], 0)
            return first + second, rows + more_rows
        return list(zip(clips, outputs, strict=True)), rows

    def _send_previews(self, clips: Sequence[ClipState]) -> None:
        """Send the previews that are due; one of them if other callers wait for the device."""
        due = [(clip, clip.estimate_1X) for clip in clips if clip.estimate_1X is not None]
        for clip in clips:
            clip.estimate_1X = None
        if len({state.path.caller for state in self._admission.states()}) > 1:
            due = sorted(due, key=lambda pair: pair[0].state.previewed_at)[:1]
        for clip, estimate_1X in due:
            if not clip.state.ended:
                self._preview(clip, estimate_1X)

    def _preview(self, clip: ClipState, estimate_1X: Tensor) -> None:
        began = clip.state.previewed_at = time.monotonic()
        try:
            mel_TM = self._pipeline.preview(estimate_1X, self._samples(clip))[0].cpu().numpy()
        except Exception as error:
            self._fail(clip.state, error)
            return
        self._admission.charge(clip.state, self._pace.work(time.monotonic() - began))
        self._send(clip.state, Preview(clip_index=clip.index, step=clip.step, mel_TM=quantise_mel(mel_TM)))

    # -------------------------------------------------------------------------------------------- who is done

    def _finish_clip(self, clip: ClipState) -> None:
        """Decode one clip and send it; end the request with its last clip."""
        state = clip.state
        began = time.monotonic()
        try:
            waveform_N = self._decode(clip)
        except Exception as error:
            self._fail(state, error)
            return
        seconds = time.monotonic() - began
        self._decode_seconds -= seconds
        self._pace.add_decode(state.frames, seconds)
        self._admission.charge(state, self._pace.work(seconds))
        state.decodes.append(Stage("decode", began, began + seconds))
        state.clips_done += 1
        if is_silent(waveform_N):
            state.silent.append(clip.index)
        self._faults = 0
        rate = self._sampling_rate
        self._meter.count_clip(audio_seconds=len(waveform_N) / rate, seconds=seconds)
        self._send(state, Clip.of_samples(waveform_N, rate, index=clip.index, seed=state.request.seed))
        if state.clips_done == state.request.clip_count:
            self._end(state, self._finished(state))

    def _finished(self, state: RequestState) -> Finished:
        return Finished(
            model=self._model,
            warnings=state.warnings(),
            timings=state.timings(),
            adapter=None if state.adapter is None else state.adapter.version,
        )

    def _decode(self, clip: ClipState) -> NDArray[np.float32]:
        """Return the clip's waveform [N]. Clips are decoded one at a time, so that they are independent."""
        if not torch.isfinite(clip.latents_1X).all():
            raise NotFiniteError.of(f"denoised clip {clip.index}", self._model.digest)
        waveform_BN = self._pipeline.decode(clip.latents_1X, self._samples(clip))
        waveform_N: NDArray[np.float32] = waveform_BN[0].cpu().numpy()
        if not np.isfinite(waveform_N).all():
            raise NotFiniteError.of(f"decoded clip {clip.index}", self._model.digest)
        return waveform_N if self._mark is None else self._mark(waveform_N)

    def _samples(self, clip: ClipState) -> int:
        return round(clip.state.request.duration * self._sampling_rate)


def out_of_memory(error: Exception) -> bool:
    """Return whether the device's memory ran out. On the CPU, PyTorch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_clips(clips: Sequence[ClipState]) -> list[ClipState]:
    """Return each request's clip of lowest clip index."""
    first: dict[int, ClipState] = {}
    for clip in clips:
        known = first.get(clip.state.path.number)
        if known is None or clip.index < known.index:
            first[clip.state.path.number] = clip
    return list(first.values())
