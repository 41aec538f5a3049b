"""What the engine's tests look through: a record of denoiser calls, and a list of a request's events."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from services.api.generation import Clip, Event, Failed, Finished
from services.models.architectures import ARCHITECTURES

E = TypeVar("E")
TIMEOUT = 60.0


@dataclass(frozen=True)
class Call:
    """One call of the real denoiser."""

    rows: int
    frames: int
    timesteps: tuple[float, ...]


@contextmanager
def denoiser_calls(pipeline: Any) -> Iterator[list[Call]]:
    """Calls of any family's denoiser; latent frames are the last dimension but one."""
    calls: list[Call] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(Call(rows=len(args[0]), frames=args[0].shape[-2], timesteps=tuple(args[1].tolist())))

    denoiser = getattr(pipeline, ARCHITECTURES[type(pipeline).__name__].denoiser)
    hook = denoiser.register_forward_pre_hook(record)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def broken(part: torch.nn.Module, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """The device fails in `part`, as long as `when` says so."""

    def fail(*_: object) -> None:
        if when():
            raise RuntimeError("the device failed")

    hook = part.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class Watch:
    """A request's callback: keeps the events, and calls `then` after each."""

    then: Callable[[Event], None] = lambda event: None
    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.then(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def wait(self) -> Event:
        assert self.ended.wait(TIMEOUT), f"still running after {TIMEOUT} s: {self.events[-1:]}"
        return self.events[-1]

    def clips(self) -> list[Clip]:
        last = self.wait()
        assert isinstance(last, Finished), last
        return sorted(self.of(Clip), key=lambda clip: clip.index)

    def error(self) -> Exception:
        last = self.wait()
        assert isinstance(last, Failed), last
        return last.error
