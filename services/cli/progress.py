"""The progress bar on stderr while clips are generated; not shown unless stderr is a terminal."""

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from services import client


def stage_of(update: client.Update) -> str | None:
    """Return the stage to show for `update`; None if the shown stage stays."""
    match update:
        case client.Queued(position=0):
            return "next in the queue"
        case client.Queued(position=position):
            return f"queued behind {position}"
        case client.Progress(step=step, num_inference_steps=steps) if step < steps:
            return f"denoising {step}/{steps}"
        case client.Progress() | client.Clip():
            return "decoding"
        case _:
            return None


class ProgressView:
    """One progress bar with stage and time left, for one or more prompts. Thread-safe."""

    def __init__(self, *, jobs: int, quiet: bool) -> None:
        """Show a bar for `jobs` prompts; nothing if `quiet` or stderr is no terminal."""
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._jobs = jobs
        self._finished = 0
        self._fractions: dict[str, float] = {}
        self._task = TaskID(0)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._progress.start()
        self._task = self._progress.add_task("starting", total=self._jobs, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        """Show the name of the current stage."""
        self._progress.update(self._task, description=name)

    def update(self, job: str, update: client.Update) -> None:
        """Show an update of one prompt."""
        with self._lock:
            if isinstance(update, client.Progress):
                self._fractions[job] = update.fraction
            left = update.seconds_left if isinstance(update, client.Progress) else None
            stage = stage_of(update)
            if self._jobs > 1:
                stage, left = f"{self._finished} of {self._jobs} made", None
            self._show(stage, left)

    def fraction(self, job: str, fraction: float, stage: str) -> None:
        """Show the share of a job that is done, and its stage."""
        with self._lock:
            self._fractions[job] = fraction
            self._show(stage, None)

    def done(self, job: str) -> None:
        """Count one prompt as done."""
        with self._lock:
            self._finished += 1
            self._fractions.pop(job, None)
            self._show(None, None)

    def _show(self, stage: str | None, seconds_left: float | None) -> None:
        completed = self._finished + 0.98 * sum(self._fractions.values())
        if self._jobs > 1 and completed > 0:
            elapsed = self._progress.tasks[self._task].elapsed or 0.0
            seconds_left = elapsed * (self._jobs - completed) / completed
        self._progress.update(self._task, completed=completed)
        if stage is not None:
            self._progress.update(self._task, description=stage)
        if seconds_left is not None:
            self._progress.update(self._task, left=f"{seconds_left:.0f} s left")
