"""The engine in virtual time: its real queue and worker, with a model that only lets the clock pass.

Loads of minutes run in seconds and give the same figures on every machine.
"""

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import services.engine.engine
import services.engine.states
import services.engine.worker
from services.api.engine import EngineConfig
from services.api.generation import (
    Defaults,
    Event,
    Failed,
    Finished,
    GenerationModel,
    GenerationRequest,
    Limits,
    ModelGeometry,
)
from services.api.model import UNVERSIONED
from services.engine import Engine
from services.engine.worker import Worker
from services.errors import MilongaError
from services.fairness import Account
from services.models.latent import Conditioning, Solver
from tests.services.jobs import Job

Times = Callable[[int, int], float]
"""Seconds of a denoiser call by latent frames and rows."""


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class _Steps(Solver):
    """Steps without a scheduler: latents stay as they are."""

    def __init__(self, steps: int) -> None:
        self.timesteps = [float(step) for step in range(steps)]

    def step(self, output: Tensor, index: int, latents: Tensor, generator: Generator) -> Tensor:
        return latents

    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        return latents


class VirtualPipeline:
    """A `LatentPipeline` whose steps, decodes and previews take virtual time. A latent frame is 1/32 s."""

    device = torch.device("cpu")
    folds_guidance = False
    adaptable = None

    def __init__(self, clock: Clock, description: GenerationModel, step: Times, decode: float) -> None:
        """`decode`: seconds to decode one frame, and to preview it."""
        self.description = description
        self._clock, self._step, self._decode = clock, step, decode
        self.slower = 1.0
        """How many times longer everything takes."""

    def latent_frames(self, duration: float) -> int:
        return max(1, round(32 * duration))

    def steps(self, asked: int, duration: float) -> int:
        return asked

    def text_length(self, prompt: str) -> int:
        return 1

    def encode(self, prompts: list[str], *, length: int) -> Conditioning:
        return Conditioning(tensors={"mask": torch.ones((len(prompts), length), dtype=torch.bool)})

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        return ()

    def noise(self, duration: float, generator: Generator) -> Tensor:
        return torch.zeros((1, self.latent_frames(duration)))

    def solver(self, name: str, steps: int) -> Solver:
        return _Steps(steps)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        seconds: Tensor,
        jumps: Tensor | None = None,
    ) -> Tensor:
        rows, frames = latents.shape
        self._clock.now += self.slower * self._step(frames, rows)
        return latents

    def decode(self, latents: Tensor, samples: int) -> Tensor:
        self._clock.now += self.slower * self._decode * latents.shape[1]
        return torch.zeros((1, 8))

    def preview(self, latents: Tensor, samples: int) -> Tensor:
        self._clock.now += self.slower * self._decode * latents.shape[1]
        return torch.zeros((1, 4, 4))


@dataclass(kw_only=True)
class Simulation:
    """Requests that arrive in virtual time, at an engine whose turns are run here."""

    engine: Engine
    worker: Worker
    pipeline: "VirtualPipeline"
    clock: Clock
    jobs: list[Job] = field(default_factory=list)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: Any = field(default_factory=itertools.count)

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._due, (when, next(self._numbers), act))

    def submit(
        self,
        caller: str,
        *,
        priority: Any = "interactive",
        timeout: float | None = None,
        then: Callable[[Job], None] | None = None,
        **options: Any,
    ) -> Job:
        """Submit a request now. `then` is called when it has ended, or was refused."""
        request: GenerationRequest = self.engine.request("rain", **{"seed": 1} | options)
        now = self.clock.now
        job = Job(caller=caller, start=now, work=request.clip_count * request.num_inference_steps)
        self.jobs.append(job)

        def end(error: Exception | None) -> None:
            job.end, job.error = self.clock.now, error
            if then is not None:
                then(job)

        def on_event(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                end(event.error if isinstance(event, Failed) else None)

        try:
            self.engine.submit(
                request,
                on_event,
                deadline=None if timeout is None else now + timeout,
                account=Account(caller, priority),
            )
        except MilongaError as error:
            end(error)
        return job

    def loop(self, caller: str, *, until: float, pause: float = 0.0, **options: Any) -> None:
        """Submit a request, and another `pause` seconds after it ended, until a time. Refused: a second."""

        def again(job: Job) -> None:
            wait = pause if job.good else max(1.0, getattr(job.error, "retry_after", 1.0))
            if self.clock.now + wait < until:
                self.at(self.clock.now + wait, lambda: submit())

        def submit() -> None:
            self.submit(caller, then=again, **options)

        self.at(self.clock.now, submit)

    def run(self, until: float = math.inf) -> None:
        """Let time pass until then, or until nothing is left to do."""
        while self.clock.now < until:
            while self._due and self._due[0][0] <= self.clock.now:
                heapq.heappop(self._due)[2]()
            if self.engine.stats.running:
                self.worker._turn()
            elif self._due and self._due[0][0] < until:
                self.clock.now = self._due[0][0]
            else:
                return

    def of(self, caller: str) -> list[Job]:
        """The jobs of a caller that ended well."""
        return [job for job in self.jobs if job.caller == caller and job.good]


def linear(seconds_per_row: float) -> Times:
    """A device that every row occupies, as a CPU."""
    return lambda frames, rows: seconds_per_row * rows * frames / 32


def wide(seconds: float) -> Times:
    """A device that sixteen rows of a second make half as slow again as one, as a GPU."""
    return lambda frames, rows: seconds * (1 + rows * frames / 32 / 32)


LIMITS = Limits(
    max_prompt_characters=1000,
    min_duration=1 / 32,
    max_duration=10.0,
    max_clip_count=8,
    max_steps=1000,
    max_guidance_scale=20.0,
    max_seed=2**63 - 1,
    schedulers=("plain",),
)
DEFAULTS = Defaults(
    duration=1.0, num_inference_steps=25, guidance_scale=3.0, scheduler="plain", sampling_rate=16_000
)
GEOMETRY = ModelGeometry(
    sampling_rate=16_000,
    hop_length=0,
    mel_bins=0,
    latent_channels=0,
    latent_downsampling=0,
    duration_grid=0.0,
)


@contextmanager
def simulate(step: Times, *, decode: float = 0.005, **config: Any) -> Iterator[Simulation]:
    """Yield a simulation: an engine without a thread, and without a clock of its own."""
    clock = Clock()
    description = GenerationModel(model=UNVERSIONED, geometry=GEOMETRY, limits=LIMITS, defaults=DEFAULTS)
    pipeline: Any = VirtualPipeline(clock, description, step, decode)
    with pytest.MonkeyPatch.context() as patch:
        for module in (services.engine.engine, services.engine.states, services.engine.worker):
            patch.setattr(module, "time", clock)
        with pytest.MonkeyPatch.context() as without_threads:
            without_threads.setattr(threading.Thread, "start", lambda thread: None)
            engine = Engine(pipeline, EngineConfig(threads=1, **config))
        simulation = Simulation(engine=engine, worker=engine._worker, pipeline=pipeline, clock=clock)
        for clips in (1, 1, 1, 8, 8, 8):  # measures the pace
            simulation.submit("warm", clip_count=clips)
            simulation.run()
        simulation.jobs.clear()
        yield simulation
