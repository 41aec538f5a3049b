"""The engine's mutable state of requests and their clips.

Shapes: X the model's own shape of latents. All of it belongs to the engine's worker thread, except
`RequestState.cancelled` and `RequestState.done`, which any thread may set or read.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from services.api.generation import Event, GenerationRequest, Progress, Timings
from services.engine.batching import GUIDED_ROWS, UNGUIDED_ROWS
from services.engine.prompts import EncodedPrompt
from services.fairness import Path
from services.models.latent import LatentPipeline, clip_generator
from services.models.lora import Adapter


class Stage(NamedTuple):
    """A part of a request's time."""

    name: str
    """queue, encode_text, denoise, or decode: one per clip."""
    start: float
    """On the clock of `time.monotonic`."""
    end: float


class GroupKey(NamedTuple):
    """Properties that clips of one denoiser call have in common."""

    frames: int
    """Latent frames."""
    text_length: int
    """Padded text tokens."""


@dataclass(kw_only=True, slots=True, eq=False)
class RequestState:
    """One request in progress."""

    path: Path
    """Whose share of the device it uses, and its number by arrival."""
    request: GenerationRequest
    """The complete request, with the steps that the model takes."""
    asked_steps: int | None
    """Steps that were asked for; None: the default."""
    frames: int
    """Latent frames of each clip."""
    guided_steps: int
    """First steps of each clip that take two rows of a denoiser call; the others take one."""
    on_event: Callable[[Event], None]
    """Called on the worker thread (for the first `Queued`: on the caller's)."""
    deadline: float | None
    """Deadline on the clock of `time.monotonic`."""
    wake: Callable[[], None]
    """Wakes the worker, so that it checks the request."""
    preview_interval: int
    """Steps between two previews; 0: none."""
    adapter: Adapter | None = None
    """Of the denoiser. It is held here until the request ends, even if the store drops it."""
    position: int = 0
    """Position in the queue that was last sent to the caller."""
    submitted_at: float = field(default_factory=time.monotonic)
    entered: bool = False
    """Whether it is in the queue: its caller has got the first `Queued`."""
    cancelled: bool = False
    ended: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    prompt: EncodedPrompt | None = None
    negative_prompt: EncodedPrompt | None = None
    started_at: float | None = None
    first_step_at: float | None = None
    last_step_at: float = 0.0
    previewed_at: float = 0.0
    encode_seconds: float = 0.0
    silent: list[int] = field(default_factory=list)
    """Indices of the clips without sound."""
    decodes: list[Stage] = field(default_factory=list)
    calls: int = 0
    """Denoiser calls with its clips."""
    clips_in_calls: int = 0
    """Clips of all requests in these calls."""
    steps_done: int = 0
    clips_done: int = 0
    clips_started: int = 0
    stepping: "list[ClipState]" = field(default_factory=list)
    """Started clips with steps to go, by index."""
    stepped: "deque[ClipState]" = field(default_factory=deque)
    """Clips to decode."""

    @property
    def steps_ahead(self) -> int:
        """Steps of the clip that has most of them to go."""
        if self.clips_started < self.request.clip_count:
            return self.request.num_inference_steps
        return max((self.request.num_inference_steps - clip.step for clip in self.stepping), default=0)

    @property
    def guided_steps_ahead(self) -> int:
        """Guided steps of the clip that has most of them to go."""
        return max(0, self.guided_steps - self.request.num_inference_steps + self.steps_ahead)

    @property
    def rows(self) -> int:
        """Rows of each clip in the next denoiser call, at most."""
        return GUIDED_ROWS if self.guided_steps_ahead else UNGUIDED_ROWS

    @property
    def rows_ahead(self) -> int:
        """Rows of denoiser calls that its clips still take."""
        whole = self.request.num_inference_steps + self.guided_steps
        taken = [clip.step + min(clip.step, self.guided_steps) for clip in self.stepping]
        return whole * (self.request.clip_count - self.clips_started + len(taken)) - sum(taken)

    @property
    def undecoded(self) -> int:
        """Clips that are not done."""
        return self.request.clip_count - self.clips_done

    @property
    def steps_total(self) -> int:
        """Denoising steps over all clips."""
        return self.request.clip_count * self.request.num_inference_steps

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def text_length(self) -> int:
        """Tokens that prompt and negative prompt are padded to. The prompts must be encoded."""
        assert self.prompt is not None
        assert self.negative_prompt is not None
        return max(self.prompt.conditioning.length, self.negative_prompt.conditioning.length)

    def progress(self, clip_index: int, step: int, decode_seconds: float) -> Progress:
        """Return the event for a denoiser call after which clip `clip_index` has made `step` steps.

        `decode_seconds` is the time to decode a clip, 0 if it is not known yet.
        """
        assert self.first_step_at is not None
        pace = (self.last_step_at - self.first_step_at) / self.steps_done
        left = pace * (self.steps_total - self.steps_done) + decode_seconds * self.undecoded
        return Progress(
            clip_index=clip_index,
            step=step,
            num_inference_steps=self.request.num_inference_steps,
            fraction=self.steps_done / self.steps_total,
            seconds_left=left if self.steps_done > 1 else None,
        )

    def timings(self) -> Timings:
        """Return the finished request's time by stage."""
        assert self.started_at is not None
        assert self.first_step_at is not None
        return Timings(
            queued=self.started_at - self.submitted_at,
            encode=self.encode_seconds,
            denoise=self.last_step_at - self.first_step_at,
            decode=sum(stage.end - stage.start for stage in self.decodes),
            total=time.monotonic() - self.submitted_at,
        )

    def stages(self) -> Iterator[Stage]:
        """Yield the stages so far, in order."""
        yield Stage("queue", self.submitted_at, self.started_at or time.monotonic())
        if self.started_at is not None and self.encode_seconds:
            yield Stage("encode_text", self.started_at, self.started_at + self.encode_seconds)
        if self.first_step_at is not None:
            yield Stage("denoise", self.first_step_at, self.last_step_at or time.monotonic())
        yield from tuple(self.decodes)

    def warnings(self) -> tuple[str, ...]:
        """Return what the model does not read of the prompts, beginning with the field, and silent clips."""
        fields = (("prompt", self.prompt), ("negative_prompt", self.negative_prompt))
        unread = [f"{name} {one}" for name, text in fields if text is not None for one in text.warnings]
        silent = [
            f"clip {index} is silent: its peak is below -40 dB of full scale; use other words or another seed"
            for index in sorted(self.silent)
        ]
        request, steps = self.request, self.request.num_inference_steps
        if not self.guided_steps:
            folded = request.guidance_scale > 1 and request.guidance_stop
            why = "it has no unconditional half" if folded else "there is no guidance"
            given = {"negative_prompt": request.negative_prompt, "guidance_stop": request.guidance_stop % 1}
            unread += [f"{name} has no effect on this clip: {why}" for name, value in given.items() if value]
        fixed = (
            []
            if self.asked_steps in (None, steps)
            else [
                f"num_inference_steps {self.asked_steps} has no effect: for {self.request.duration:g} s this "
                f"model takes {steps}"
            ]
        )
        adapted = () if self.adapter is None else self.adapter.warnings
        return (*unread, *silent, *fixed, *adapted)


class ClipState:
    """One clip being denoised, with its own latents, noise and solver: other clips can't change it."""

    __slots__ = ("_generator", "_solver", "estimate_1X", "index", "latents_1X", "state", "step")

    def __init__(self, pipeline: LatentPipeline, state: RequestState, index: int) -> None:
        """Draw the clip's noise on the CPU, so that it is the same on every device."""
        request = state.request
        self.state = state
        self.index = index
        self.step = 0
        self.estimate_1X: Tensor | None = None
        self._generator = clip_generator(request.seed, index)
        self._solver = pipeline.solver(request.scheduler, request.num_inference_steps)
        self.latents_1X = pipeline.noise(request.duration, self._generator)

    @property
    def rows(self) -> int:
        """Rows of the next step."""
        return GUIDED_ROWS if self.step < self.state.guided_steps else UNGUIDED_ROWS

    @property
    def timestep(self) -> float:
        """Timestep of the next step."""
        return self._solver.timesteps[self.step]

    @property
    def jump(self) -> tuple[float, float]:
        """Condition of a distilled denoiser: guidance scale, and timestep that the next step leads to."""
        return self.state.request.guidance_scale, self._solver.targets[self.step]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == len(self._solver.timesteps)

    def advance(self, output_1X: Tensor) -> None:
        """Take one denoising step with the denoiser's guided output."""
        if self._wants_preview():
            self.estimate_1X = self._solver.clean_estimate(output_1X, self.step, self.latents_1X)
        self.latents_1X = self._solver.step(output_1X, self.step, self.latents_1X, self._generator)
        self.step += 1

    def _wants_preview(self) -> bool:
        every = self.state.preview_interval
        return every > 0 and self.index == 0 and (self.step + 1) % every == 0


class Handle:
    """The caller's handle of a submitted request."""

    def __init__(self, state: RequestState) -> None:
        self._state = state

    def cancel(self) -> None:
        """Cancel the request at the next step. Has no effect once it has ended."""
        self._state.cancelled = True
        self._state.wake()

    def stages(self) -> tuple[Stage, ...]:
        """Return the request's stages so far. All have ended if the request has."""
        return tuple(self._state.stages())

    @property
    def batch(self) -> float:
        """Mean number of clips, of all requests, in the denoiser calls of this one; 0 before the first."""
        return self._state.clips_in_calls / max(1, self._state.calls)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for the request's last event; return whether it was sent."""
        return self._state.done.wait(timeout)
