"""`milonga generate --prompts`: a folder of clips from a prompt file."""

import contextlib
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from services.cli import prompts
from services.cli.making import GeneratedClips, Place, record_of, to_json, warn
from services.cli.outputs import make_folder
from services.cli.progress import ProgressView
from services.cli.signing import signed
from services.clip_folder import ClipFolder
from services.errors import FieldViolation, InvalidInputError
from services.files import write_atomically
from services.lists import shortened

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A resumable run over the prompts of a file."""

    folder: Path
    """Output folder."""
    jobs: tuple[prompts.Job, ...]
    """The prompts."""
    place: Place
    """The generator and the scorers."""
    as_json: bool
    """Print the record of each prompt as JSON."""
    signer: "ClipSigner | None" = None
    """Signs the clips; None: they are not signed."""

    def generate(self, *, parallel: int, overwrite: bool, quiet: bool) -> None:
        """Generate the missing clips. Refused prompts are reported at the end; the others continue.

        Args:
            parallel: prompts at a time.
            overwrite: regenerate finished prompts too.
            quiet: show no progress bar.

        Raises:
            InvalidInputError: prompts were refused; all others are done.
            MilongaError: the service became unavailable, or the folder is full; finished prompts stay.
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
            raise InvalidInputError(*shortened(refused))

    def _check_counts(self) -> None:
        """Raise `InvalidInputError` if a prompt's clip_count exceeds the number of candidates."""
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
            raise InvalidInputError(*shortened(faults))

    def _make_all(self, todo: list[prompts.Job], parallel: int, quiet: bool) -> list[FieldViolation]:
        """Generate the clips of `todo`, `parallel` prompts at a time; return the refusals."""
        refused: list[FieldViolation] = []
        stop = threading.Event()
        folder: ClipFolder[prompts.Job] = ClipFolder(self.folder, lambda job: job.files)
        with ProgressView(jobs=len(todo), quiet=quiet) as view, contextlib.ExitStack() as stack:
            view.stage(self.place.first_stage)
            maker = self.place.open(batch=parallel)
            stack.callback(maker.close)

            def make(job: prompts.Job) -> GeneratedClips:
                update = partial(view.update, job.name)
                made = maker.make(job.prompt, job.options, len(job.files), update, stop=stop)
                return signed(made, job.prompt, self.signer)

            def refuse(job: prompts.Job, error: InvalidInputError) -> None:
                refused.append(FieldViolation(job.name, str(error)))
                view.done(job.name)

            def give_up() -> None:
                # Requests may be waiting for a service that does not respond: closing the maker ends them.
                stop.set()
                maker.close()

            results = folder.make(todo, make, parallel, stop=give_up, refused=refuse)
            stack.callback(results.close)
            for job, made in results:
                self._record(job, made)
                view.done(job.name)
        return refused

    def _record(self, job: prompts.Job, made: GeneratedClips) -> None:
        """Write the record, which marks the prompt as done."""
        record = {
            "request": prompts.request_record(job, self.place.name),
            **record_of(made, job.files),
        }
        write_atomically(self.folder / f"{job.name}.json", (to_json(record) + "\n").encode())
        warn(made.warnings, f"{job.name}: ")
        if self.as_json:
            typer.echo(to_json({"id": job.name, "prompt": job.prompt, **record}))
