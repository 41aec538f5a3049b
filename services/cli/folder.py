"""A folder of clips, made from a file of prompts: `milonga generate --prompts`."""

import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import typer

from services.cli import prompts
from services.cli.making import GeneratedClips, Place, record_of, to_json, warn
from services.cli.outputs import make_folder, write_atomically
from services.cli.progress import ProgressView
from services.errors import FieldViolation, InvalidInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A folder of clips being made from a file of prompts."""

    folder: Path
    """Where the clips go."""
    jobs: tuple[prompts.Job, ...]
    """The prompts."""
    place: Place
    """Where they are made."""
    as_json: bool
    """Print the record of each prompt."""

    def generate(self, *, parallel: int, overwrite: bool, quiet: bool) -> None:
        """Make what is missing. A prompt that the model refuses is told at the end; the others go on.

        Raises:
            InvalidInputError: prompts were refused; all others are made.
            MilongaError: the service went away, or the folder is full: what was made stays.
        """
        self._check_counts()
        make_folder(self.folder)
        todo = [
            job for job in self.jobs if overwrite or not prompts.is_done(self.folder, job, self.place.name)
        ]
        refused: list[FieldViolation] = []
        try:
            if todo:
                refused = self._make_all(todo, parallel, quiet)
        finally:
            prompts.write_index(self.folder, self.jobs)
        if not self.as_json:
            made, kept = len(todo) - len(refused), len(self.jobs) - len(todo)
            typer.echo(f"{made} made, {kept} there already, {len(refused)} refused", err=True)
            typer.echo(self.folder / prompts.INDEX)
        if refused:
            raise InvalidInputError(*prompts.shortened(refused))

    def _check_counts(self) -> None:
        """Refuse prompts of which more clips are wanted than candidates are made."""
        best_of = self.place.best_of
        faults = [
            FieldViolation(
                job.name,
                f"clip_count is {job.options['clip_count']}, must be between 1 and --candidates "
                f"({best_of.candidates})",
            )
            for job in self.jobs
            if best_of is not None and not 1 <= (job.options.get("clip_count") or 1) <= best_of.candidates
        ]
        if faults:
            raise InvalidInputError(*prompts.shortened(faults))

    def _make_all(self, todo: list[prompts.Job], parallel: int, quiet: bool) -> list[FieldViolation]:
        """Make `todo`, several at a time. Returns what was refused."""
        refused: list[FieldViolation] = []
        stop = threading.Event()
        with ProgressView(jobs=len(todo), quiet=quiet) as view, ThreadPoolExecutor(parallel) as pool:
            view.stage(self.place.first_stage)
            maker = self.place.open(batch=parallel)
            try:
                pending: dict[Future[GeneratedClips], prompts.Job] = {
                    pool.submit(
                        maker.make, job.prompt, job.options, len(job.files),
                        partial(view.update, job.name), stop=stop,
                    ): job
                    for job in todo
                }  # fmt: skip
                while pending:
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        job = pending.pop(future)
                        try:
                            self._write(job, future.result())
                        except InvalidInputError as error:
                            refused.append(FieldViolation(job.name, str(error)))
                        view.done(job.name)
            finally:
                # Reached with jobs under way only when something failed, or on Ctrl-C. Closing the maker
                # ends them at once: they may be waiting for a service that says nothing.
                stop.set()
                maker.close()
                pool.shutdown(wait=True, cancel_futures=True)
        return refused

    def _write(self, job: prompts.Job, made: GeneratedClips) -> None:
        """Write the clips, then the record that makes them count."""
        for clip, file in zip(made.clips, job.files, strict=True):
            write_atomically(self.folder / file, clip.audio)
        record = {
            "request": prompts.request_record(job, self.place.name),
            **record_of(made, job.files),
        }
        write_atomically(self.folder / f"{job.name}.json", (to_json(record) + "\n").encode())
        warn(made.generation.warnings, f"{job.name}: ")
        if self.as_json:
            typer.echo(to_json({"id": job.name, "prompt": job.prompt, **record}))
