"""The worker thread's loop: between denoiser calls, clips start, end and are decoded.

Shapes: T mel frames, M mel bins, N samples.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from services.api.engine import EngineConfig
from services.api.generation import Clip, Event, Failed, Finished, Preview, Queued, quantise_mel
from services.api.model import ModelVersion
from services.engine.admission import Admission, Ticket
from services.engine.batching import decodes_this_turn, entry_work, next_turn, row_shapes
from services.engine.denoiser import Denoiser
from services.engine.prompts import PromptCache
from services.engine.states import ClipState, GroupKey, RequestState
from services.engine.stats import Meter
from services.errors import DeadlineExceededError, RequestCancelledError, ServiceUnavailableError
from services.models.latent import LatentPipeline

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Group:
    """Clips that can be in one denoiser call."""

    work: float
    """Latent frames that each clip was given, see `batching.next_turn`."""
    clips: list[ClipState] = field(default_factory=list)


class Worker:
    """Runs the requests of an engine on the worker thread."""

    def __init__(
        self,
        pipeline: LatentPipeline,
        model: ModelVersion,
        config: EngineConfig,
        admission: Admission,
        meter: Meter,
    ) -> None:
        self._pipeline = pipeline
        self._model = model
        self._config = config
        self._admission = admission
        self._meter = meter
        self._sampling_rate = pipeline.description.geometry.sampling_rate
        self._prompts = PromptCache(pipeline, config.prompt_cache_size)
        self._denoiser = Denoiser(pipeline, row_shapes(config.batch_shapes), exact=config.exact)
        self._groups: dict[GroupKey, _Group] = {}
        self._decoding: deque[ClipState] = deque()

    def run(self) -> None:
        """Work until the admission is closed and all requests have ended. No request can end it early."""
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        with torch.inference_mode():
            while self._admission.wait_for_work():
                try:
                    self._turn()
                except Exception as error:
                    _log.exception("a turn of the engine failed; all its requests are failed with it")
                    for state in self._admission.states():
                        self._end(state, Failed(error=error))

    def _turn(self) -> None:
        self._reap()
        self._seat()
        if self._groups:
            self._step()
        for _ in range(decodes_this_turn(len(self._decoding), stepping=bool(self._groups))):
            # A request that ends takes its clips with it, so there may be fewer than counted.
            if self._decoding:
                self._finish_clip(self._decoding.popleft())
        if not self._groups:
            self._denoiser.forget()

    # --------------------------------------------------------------------------------------------- who leaves

    def _reap(self) -> None:
        """End requests that are cancelled or expired, or all of them if the engine is aborting."""
        for state in self._admission.states():
            error = self._verdict(state)
            if error is not None:
                self._end(state, Failed(error=error))

    def _verdict(self, state: RequestState) -> Exception | None:
        """Return the error that must end a request now; None if it may go on."""
        if state.cancelled:
            return RequestCancelledError("the request was cancelled")
        if state.expired:
            done = f"{state.steps_done} of {state.steps_total} steps"
            return DeadlineExceededError(
                f"the deadline passed after {done}; allow more time or take fewer steps"
            )
        if self._admission.aborting:
            return ServiceUnavailableError(
                "the engine stopped before the request was done; try another instance"
            )
        return None

    def _end(self, state: RequestState, event: Finished | Failed) -> None:
        """Send a request its last event, and remove it."""
        if state.ended:
            return
        state.ended = True
        self._decoding = deque(clip for clip in self._decoding if clip.state is not state)
        for key, group in list(self._groups.items()):
            self._keep(key, [clip for clip in group.clips if clip.state is not state])
        # Before the event: its receiver may read the queue or submit another request at once.
        self._meter.count_end(event)
        self._admission.remove(state)
        self._send(state, event)
        state.done.set()

    def _keep(self, key: GroupKey, clips: list[ClipState]) -> None:
        """Leave only `clips` in a group, and drop the group if there is none."""
        if clips:
            self._groups[key].clips = clips
        else:
            del self._groups[key]

    def _fail(self, state: RequestState, error: Exception) -> None:
        _log.error("request %d failed", state.number, exc_info=error)
        self._end(state, Failed(error=error))

    def _send(self, state: RequestState, event: Event) -> None:
        """Send an event. A callback that raises loses its request, and nothing else."""
        try:
            state.on_event(event)
        except Exception:
            _log.exception("the callback of request %d failed; the request is cancelled", state.number)
            state.cancelled = True

    # ---------------------------------------------------------------------------------------------- who joins

    def _seat(self) -> None:
        """Start waiting clips while there is room, in the order of the queue."""
        tickets = self._admission.tickets()
        seated = False
        for ticket in tickets:
            if ticket.state.ended:
                continue
            if not self._length_may_run(ticket.state.frames):
                # Later clips must wait too: otherwise this length might never start.
                break
            if self._taken(ticket.state.frames) < self._config.batch_shapes[-1]:
                self._start(ticket)
                seated = True
        if seated:
            self._report_positions()

    def _length_may_run(self, frames: int) -> bool:
        lengths = {key.frames for key in self._groups}
        return frames in lengths or len(lengths) < self._config.max_lengths

    def _taken(self, frames: int) -> int:
        return sum(len(group.clips) for key, group in self._groups.items() if key.frames == frames)

    def _start(self, ticket: Ticket) -> None:
        """Start a waiting clip: add it to its group."""
        state = ticket.state
        self._admission.take(ticket)
        try:
            if state.started_at is None:
                self._encode(state)
            clip = ClipState(self._pipeline, state, ticket.clip_index)
        except Exception as error:
            self._fail(state, error)
            return
        key = GroupKey(state.frames, state.text_length)
        if key not in self._groups:
            self._groups[key] = _Group(work=entry_work(group.work for group in self._groups.values()))
        self._groups[key].clips.append(clip)

    def _encode(self, state: RequestState) -> None:
        state.started_at = time.monotonic()
        state.prompt = self._prompts.encode(state.request.prompt)
        state.negative_prompt = self._prompts.encode(state.request.negative_prompt)
        state.encode_seconds = time.monotonic() - state.started_at

    def _report_positions(self) -> None:
        """Send requests without a started clip their position in the queue, if it changed."""
        seen: set[int] = set()
        for position, ticket in enumerate(self._admission.tickets()):
            state = ticket.state
            if state.number in seen:
                continue
            seen.add(state.number)
            if state.started_at is None and state.position != position:
                state.position = position
                self._send(state, Queued(position=position))

    # ----------------------------------------------------------------------------------------------- who runs

    def _step(self) -> None:
        """Run one denoising step with the clips of one group."""
        key = next_turn({key: group.work for key, group in self._groups.items()})
        group = self._groups[key]
        clips = group.clips
        group.work += key.frames
        started = time.monotonic()
        first_clips = _first_clips(clips)
        for clip in first_clips:
            clip.state.first_step_at = clip.state.first_step_at or started
        try:
            outputs, rows = self._denoiser(key, clips)
        except Exception as error:
            for clip in first_clips:
                self._fail(clip.state, error)
            return
        for clip, output_1X in zip(clips, outputs, strict=True):
            try:
                clip.advance(output_1X)
            except Exception as error:
                self._fail(clip.state, error)
        now = time.monotonic()
        self._meter.count_step(
            clips=len(clips), used=sum(s.rows for s in clips), rows=rows, seconds=now - started
        )
        finished = [clip for clip in clips if clip.finished and not clip.state.ended]
        self._decoding.extend(finished)
        if key in self._groups:
            self._keep(key, [clip for clip in self._groups[key].clips if not clip.finished])
        self._report_progress(clips, first_clips, now)

    def _report_progress(
        self, clips: Sequence[ClipState], first_clips: Sequence[ClipState], now: float
    ) -> None:
        for clip in clips:
            clip.state.steps_done += 1
            clip.state.last_step_at = now
        for clip in first_clips:
            if not clip.state.ended:
                self._send(clip.state, clip.state.progress(clip.index, clip.step, self._meter.decode_seconds))
                self._preview(clip)

    def _preview(self, clip: ClipState) -> None:
        estimate_1X, clip.estimate_1X = clip.estimate_1X, None
        if estimate_1X is None:
            return
        try:
            mel_TM = self._pipeline.preview(estimate_1X, self._samples(clip))[0].cpu().numpy()
        except Exception as error:
            self._fail(clip.state, error)
            return
        self._send(clip.state, Preview(clip_index=clip.index, step=clip.step, mel_TM=quantise_mel(mel_TM)))

    # -------------------------------------------------------------------------------------------- who is done

    def _finish_clip(self, clip: ClipState) -> None:
        """Decode one clip and send it; end the request with its last clip."""
        state = clip.state
        error = self._verdict(state)
        if error is not None:
            self._end(state, Failed(error=error))
            return
        started = time.monotonic()
        try:
            waveform_N = self._decode(clip)
        except Exception as fault:
            self._fail(state, fault)
            return
        seconds = time.monotonic() - started
        state.decode_seconds += seconds
        state.clips_done += 1
        rate = self._sampling_rate
        self._meter.count_clip(audio_seconds=len(waveform_N) / rate, seconds=seconds)
        self._send(state, Clip.of_samples(waveform_N, rate, index=clip.index, seed=state.request.seed))
        if state.clips_done == state.request.clip_count:
            self._end(state, Finished(model=self._model, warnings=state.warnings(), timings=state.timings()))

    def _decode(self, clip: ClipState) -> NDArray[np.float32]:
        """Return the clip's waveform [N]. Clips are decoded one at a time, so that they are independent."""
        waveform_BN = self._pipeline.decode(clip.latents_1X, self._samples(clip))
        waveform_N: NDArray[np.float32] = waveform_BN[0].cpu().numpy()
        if not np.isfinite(waveform_N).all():
            raise FloatingPointError("the model returned a waveform with infinite or undefined samples")
        return waveform_N

    def _samples(self, clip: ClipState) -> int:
        return round(clip.state.request.duration * self._sampling_rate)


def _first_clips(clips: Sequence[ClipState]) -> list[ClipState]:
    """Return each request's clip of lowest clip index."""
    first: dict[int, ClipState] = {}
    for clip in clips:
        known = first.get(clip.state.number)
        if known is None or clip.index < known.index:
            first[clip.state.number] = clip
    return list(first.values())
