"""The loop of the thread that owns the device: between denoiser calls, requests join, leave and are decoded.

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
from services.engine.jobs import GroupKey, Job, Slot
from services.engine.prompts import PromptCache
from services.engine.stats import Meter
from services.errors import DeadlineExceededError, RequestCancelledError, ServiceUnavailableError
from services.models.latent import LatentPipeline

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Group:
    """Clips that can be in one denoiser call."""

    work: float
    """Latent frames that each clip was given, see `batching.next_turn`."""
    slots: list[Slot] = field(default_factory=list)


class Worker:
    """Everything that happens on the worker thread."""

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
        self._decoding: deque[Slot] = deque()

    def run(self) -> None:
        """Work until the admission is closed and all jobs have ended. Survives whatever a job does."""
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        with torch.inference_mode():
            while self._admission.wait_for_work():
                try:
                    self._turn()
                except Exception as error:
                    _log.exception("a turn of the engine failed; all its requests are failed with it")
                    for job in self._admission.jobs():
                        self._end(job, Failed(error=error))

    def _turn(self) -> None:
        self._reap()
        self._seat()
        if self._groups:
            self._step()
        for _ in range(decodes_this_turn(len(self._decoding), stepping=bool(self._groups))):
            # A job that ends takes its slots with it, so there may be fewer than counted.
            if self._decoding:
                self._finish_clip(self._decoding.popleft())
        if not self._groups:
            self._denoiser.forget()

    # --------------------------------------------------------------------------------------------- who leaves

    def _reap(self) -> None:
        """End jobs that are cancelled or expired, or all of them if the engine is aborting."""
        for job in self._admission.jobs():
            error = self._verdict(job)
            if error is not None:
                self._end(job, Failed(error=error))

    def _verdict(self, job: Job) -> Exception | None:
        """Return why `job` must not go on, if so."""
        if job.cancelled:
            return RequestCancelledError("the request was cancelled")
        if job.expired:
            done = f"{job.steps_done} of {job.steps_total} steps"
            return DeadlineExceededError(
                f"the deadline passed after {done}; allow more time or take fewer steps"
            )
        if self._admission.aborting:
            return ServiceUnavailableError(
                "the engine stopped before the request was done; try another instance"
            )
        return None

    def _end(self, job: Job, event: Finished | Failed) -> None:
        """Send `job` its last event and forget it."""
        if job.ended:
            return
        job.ended = True
        self._decoding = deque(slot for slot in self._decoding if slot.job is not job)
        for key, group in list(self._groups.items()):
            self._keep(key, [slot for slot in group.slots if slot.job is not job])
        # Before the event: who has it may look at the queue at once, or send the next request.
        self._meter.count_end(event)
        self._admission.remove(job)
        self._send(job, event)
        job.done.set()

    def _keep(self, key: GroupKey, slots: list[Slot]) -> None:
        """Leave only `slots` in a group, and drop the group if there is none."""
        if slots:
            self._groups[key].slots = slots
        else:
            del self._groups[key]

    def _fail(self, job: Job, error: Exception) -> None:
        _log.error("request %d failed", job.number, exc_info=error)
        self._end(job, Failed(error=error))

    def _send(self, job: Job, event: Event) -> None:
        """Send an event. A callback that raises loses its request, and nothing else."""
        try:
            job.on_event(event)
        except Exception:
            _log.exception("the callback of request %d failed; the request is cancelled", job.number)
            job.cancelled = True

    # ---------------------------------------------------------------------------------------------- who joins

    def _seat(self) -> None:
        """Give free places to waiting clips, in the order of the queue."""
        tickets = self._admission.tickets()
        seated = False
        for ticket in tickets:
            if ticket.job.ended:
                continue
            if not self._length_may_run(ticket.job.frames):
                # Those behind must wait too: if they went ahead, this length might never get its turn.
                break
            if self._taken(ticket.job.frames) < self._config.batch_shapes[-1]:
                self._start(ticket)
                seated = True
        if seated:
            self._report_positions()

    def _length_may_run(self, frames: int) -> bool:
        lengths = {key.frames for key in self._groups}
        return frames in lengths or len(lengths) < self._config.max_lengths

    def _taken(self, frames: int) -> int:
        return sum(len(group.slots) for key, group in self._groups.items() if key.frames == frames)

    def _start(self, ticket: Ticket) -> None:
        """Turn a waiting clip into a slot of its group."""
        job = ticket.job
        self._admission.take(ticket)
        try:
            if job.started_at is None:
                self._encode(job)
            slot = Slot(self._pipeline, job, ticket.clip_index)
        except Exception as error:
            self._fail(job, error)
            return
        key = GroupKey(job.frames, job.text_length)
        if key not in self._groups:
            self._groups[key] = _Group(work=entry_work(group.work for group in self._groups.values()))
        self._groups[key].slots.append(slot)

    def _encode(self, job: Job) -> None:
        job.started_at = time.monotonic()
        job.prompt = self._prompts.encode(job.request.prompt)
        job.negative_prompt = self._prompts.encode(job.request.negative_prompt)
        job.encode_seconds = time.monotonic() - job.started_at

    def _report_positions(self) -> None:
        """Report to jobs without a started clip their position in the queue, if it changed."""
        seen: set[int] = set()
        for position, ticket in enumerate(self._admission.tickets()):
            job = ticket.job
            if job.number in seen:
                continue
            seen.add(job.number)
            if job.started_at is None and job.position != position:
                job.position = position
                self._send(job, Queued(position=position))

    # ----------------------------------------------------------------------------------------------- who runs

    def _step(self) -> None:
        """Take one denoising step with the clips of one group."""
        key = next_turn({key: group.work for key, group in self._groups.items()})
        group = self._groups[key]
        slots = group.slots
        group.work += key.frames
        started = time.monotonic()
        first_slots = _first_slots(slots)
        for slot in first_slots:
            slot.job.first_step_at = slot.job.first_step_at or started
        try:
            outputs, rows = self._denoiser(key, slots)
        except Exception as error:
            for slot in first_slots:
                self._fail(slot.job, error)
            return
        for slot, output_1X in zip(slots, outputs, strict=True):
            try:
                slot.advance(output_1X)
            except Exception as error:
                self._fail(slot.job, error)
        now = time.monotonic()
        self._meter.count_step(
            clips=len(slots), used=sum(s.rows for s in slots), rows=rows, seconds=now - started
        )
        finished = [slot for slot in slots if slot.finished and not slot.job.ended]
        self._decoding.extend(finished)
        if key in self._groups:
            self._keep(key, [slot for slot in self._groups[key].slots if not slot.finished])
        self._report_progress(slots, first_slots, now)

    def _report_progress(self, slots: Sequence[Slot], first_slots: Sequence[Slot], now: float) -> None:
        for slot in slots:
            slot.job.steps_done += 1
            slot.job.last_step_at = now
        for slot in first_slots:
            if not slot.job.ended:
                self._send(slot.job, slot.job.progress(slot.index, slot.step, self._meter.decode_seconds))
                self._preview(slot)

    def _preview(self, slot: Slot) -> None:
        estimate_1X, slot.estimate_1X = slot.estimate_1X, None
        if estimate_1X is None:
            return
        try:
            mel_TM = self._pipeline.preview(estimate_1X, self._samples(slot))[0].cpu().numpy()
        except Exception as error:
            self._fail(slot.job, error)
            return
        self._send(slot.job, Preview(clip_index=slot.index, step=slot.step, mel_TM=quantise_mel(mel_TM)))

    # -------------------------------------------------------------------------------------------- who is done

    def _finish_clip(self, slot: Slot) -> None:
        """Decode one clip and send it; with the last one, end the job."""
        job = slot.job
        error = self._verdict(job)
        if error is not None:
            self._end(job, Failed(error=error))
            return
        started = time.monotonic()
        try:
            waveform_N = self._decode(slot)
        except Exception as fault:
            self._fail(job, fault)
            return
        seconds = time.monotonic() - started
        job.decode_seconds += seconds
        job.clips_done += 1
        rate = self._sampling_rate
        self._meter.count_clip(audio_seconds=len(waveform_N) / rate, seconds=seconds)
        self._send(job, Clip.of_samples(waveform_N, rate, index=slot.index, seed=job.request.seed))
        if job.clips_done == job.request.clip_count:
            self._end(job, Finished(model=self._model, warnings=job.warnings(), timings=job.timings()))

    def _decode(self, slot: Slot) -> NDArray[np.float32]:
        """Return the slot's waveform, [N]. One clip at a time, so that its bits depend on no other."""
        waveform_BN = self._pipeline.decode(slot.latents_1X, self._samples(slot))
        waveform_N: NDArray[np.float32] = waveform_BN[0].cpu().numpy()
        if not np.isfinite(waveform_N).all():
            raise FloatingPointError("the model made a waveform with infinite or undefined samples")
        return waveform_N

    def _samples(self, slot: Slot) -> int:
        return round(slot.job.request.duration * self._sampling_rate)


def _first_slots(slots: Sequence[Slot]) -> list[Slot]:
    """Return each job's slot of lowest clip index."""
    first: dict[int, Slot] = {}
    for slot in slots:
        known = first.get(slot.job.number)
        if known is None or slot.index < known.index:
            first[slot.job.number] = slot
    return list(first.values())
