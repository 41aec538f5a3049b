"""The second study of alignment, one program. Killed anywhere, the same command resumes.

    python -m benchmarks.study2                          # everything; started once per core, they share it
    python -m benchmarks.study2 --recipe study-2-smoke   # every stage in a few steps
    python -m benchmarks.study2 --set prompts.split=validation --set seeds=0 --output build/study2/pilot
    python -m benchmarks.study2 --tables benchmarks/alignment-2   # tables and plots alone, in seconds
    python -m benchmarks.study2 --recipe real-study --set start=file:mini-real-base \
        --set world.recordings=esc10/clips.csv --set world.yamnet=yamnet.tflite     # on recordings

Stages, each a folder that is done, or is locked by the process that works on it: data sets of pairs,
trainings, figures of each model, Fréchet and kernel distances. In ``--output`` (`build/study2/NAME`):
`data/`, `models/`, `figures/`, and `result/` with `clips.json.gz` (the figures of every clip), `sets.json`
(distances, which need embeddings), `trainings.json`, and what is computed from these three: `study.json`,
`study.md`, `growth.png`. A study registers nothing and logs to no server.
"""

import fcntl
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
import typer

from benchmarks.study2.config import BASE, Data, StudyRun, Training, linked, shared_data, trainings
from benchmarks.study2.recipes import RECIPES
from benchmarks.study2.results import write_inputs
from benchmarks.study2.scoring import (
    KINDS,
    Kind,
    read_references,
    references_of,
    score_model,
    write_references,
    write_scores,
)
from benchmarks.study2.tables import tabulate
from benchmarks.study2.worlds import world_of
from services.environment import quiet_libraries
from services.errors import invalid
from training.exits import EXIT_CODES, exit_codes
from training.finetuning.baton import BatonTraining, train_baton
from training.finetuning.dpo import DpoTraining, train_dpo
from training.finetuning.session import TRAINING, parquet_files
from training.finetuning.sft import SftTraining, train_sft
from training.loop.config import describe, flatten, override
from training.loop.run_folder import claim_folder
from training.runs.recipes import recipe

FREE = ("seeds", "methods", "growth_pairs", "growth_betas")
"""Settings that may change when a study is resumed."""
PAIRS = "pairs.parquet"
POLL_SECONDS = 5.0
"""Between two looks at the stages that another process works on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A unit of work, done by one process."""

    name: str
    made: Path
    """File or folder that is there when the stage is done."""
    needs: tuple[Path, ...]
    """What has to be there first."""
    run: Callable[[], object]


class Study:
    """The stages of a study in a folder."""

    def __init__(self, config: StudyRun, output: Path) -> None:
        self.config, self.output = config, output
        self.world = world_of(config, output)
        self.trainings = trainings(config)
        self.uris = {BASE: config.start}
        self.uris |= {one.name: f"file:{output / 'models' / one.name}" for one in self.trainings}

    def stages(self) -> list[Stage]:
        """Return all stages, in an order in which each can be run."""
        found: dict[str, Stage] = {}
        for training in self.trainings:
            for stage in (*self._data(training), self._training(training)):
                found.setdefault(stage.name, stage)
        kinds = [kind for kind in KINDS if getattr(self.config.prompts, kind)]
        for kind in kinds:
            found[f"references, {kind}"] = self._references(kind)
            for name in self.scored():
                found[f"figures of {name}, {kind}"] = self._figures(name, kind)
        made = tuple(self._scores(name, kind) for name in self.scored() for kind in kinds)
        inputs = partial(write_inputs, self.config, self.world, self.output, self.scored(), kinds)
        result = self.output / "result" / "trainings.json"
        found["distances"] = Stage(name="distances", made=result, needs=made, run=inputs)
        return list(found.values())

    def scored(self) -> list[str]:
        """Return the models that are evaluated."""
        return [BASE, *(one.name for one in self.trainings if one.scored)]

    def _data(self, training: Training) -> list[Stage]:
        """Return the stages of a training's data: candidates and pairs, then the first ones of them."""
        data, shared = training.data, shared_data(self.config)
        whole = self._pairs(replace(data, limit=0))
        stages = []
        needs: tuple[Path, ...] = () if data.model == BASE else (self._model(data.model),)
        if data.model == BASE and data.name != shared.name:
            # It ranks the same candidates, which one process makes.
            needs = (self._pairs(replace(shared, limit=0)),)
            stages = self._data(replace(training, data=shared))
        stages.append(Stage(name=f"data {data.name}", made=whole, needs=needs, run=partial(self._rank, data)))
        if data.limit:
            part = self._pairs(data)
            run = partial(write_subset, whole, part, data.limit)
            stages.append(Stage(name=f"data {part.parent.name}", made=part, needs=(whole,), run=run))
        return stages

    def _rank(self, data: Data) -> None:
        """Make the pairs, and write them to one file."""
        made = self.world.make_pairs(data, self.uris[data.model], self.output / "data" / f"of-{data.model}")
        write_subset(made, self.output / "data" / data.name / PAIRS, 0)

    def _training(self, training: Training) -> Stage:
        pairs = self._pairs(training.data)
        needs = (pairs,) if training.start == BASE else (pairs, self._model(training.start))
        config = linked(training, self.uris, pairs, self.output / "latents")
        return Stage(
            name=f"training {training.name}",
            made=self._model(training.name),
            needs=needs,
            run=partial(train, config, self.output / "models" / training.name),
        )

    def _references(self, kind: Kind) -> Stage:
        def run() -> None:
            write_references(made, references_of(self.world.plan(kind), self.world.sampled(kind)))

        made = self._scores("references", kind)
        return Stage(name=f"references, {kind}", made=made, needs=(), run=run)

    def _figures(self, name: str, kind: Kind) -> Stage:
        def run() -> None:
            scores = score_model(
                name,
                self.uris[name],
                self.world.plan(kind),
                self.world.sampled(kind),
                self.world.judge(),
                read_references(references),
                self.output / "clips",
            )
            write_scores(made, scores)

        made, references = self._scores(name, kind), self._scores("references", kind)
        needs = (references,) if name == BASE else (references, self._model(name))
        return Stage(name=f"figures of {name}, {kind}", made=made, needs=needs, run=run)

    def _pairs(self, data: Data) -> Path:
        name = f"{data.name}-{data.limit}" if data.limit else data.name
        return self.output / "data" / name / PAIRS

    def _model(self, name: str) -> Path:
        return self.output / "models" / name / TRAINING

    def _scores(self, name: str, kind: Kind) -> Path:
        return self.output / "figures" / kind / f"{name}.npz"


def run_stages(stages: list[Stage], locks: Path) -> None:
    """Run the stages that nobody has done or works on; return when all are done."""
    locks.mkdir(parents=True, exist_ok=True)
    while left := [stage for stage in stages if not stage.made.exists()]:
        ready = [stage for stage in left if all(path.exists() for path in stage.needs)]
        for stage in ready:
            with locked(locks / stage.name) as free:
                if free and not stage.made.exists():
                    print(f"study: {stage.name} ({len(left)} left)", file=sys.stderr, flush=True)
                    stage.run()
                    break
        else:
            time.sleep(POLL_SECONDS)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock while the block runs; yield whether it was free. The system frees it if a process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_subset(source: Path, path: Path, limit: int) -> None:
    """Write the first `limit` pairs of a file or data set, in a fixed random order (0: all) to `path`."""
    table = pq.read_table(list(parquet_files([source])))
    if limit > len(table):
        raise invalid("pairs", f"{limit} are wanted and {source} has {len(table)}; sample of more captions")
    if limit:
        order = np.random.default_rng(17).permutation(len(table))
        table = table.take(np.sort(order[:limit]))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    pq.write_table(table, temporary, row_group_size=32)
    temporary.replace(path)


def train(config: object, folder: Path) -> None:
    """Run one training; its checkpoints and optimiser go when it is done."""
    match config:
        case SftTraining():
            train_sft(config, folder)
        case DpoTraining():
            train_dpo(config, folder)
        case BatonTraining():
            train_baton(config, folder)
        case _:
            raise AssertionError(type(config))
    shutil.rmtree(folder.with_name(f"{folder.name}.run") / "checkpoints", ignore_errors=True)


def main(
    name: Annotated[
        str, typer.Option("--recipe", help="mini-study-2, study-2-smoke, real-study or real-study-smoke.")
    ] = "mini-study-2",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a setting; repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of all stages.", show_default="build/study2/NAME"),
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="Only compute tables and plots of a result's folder again.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the settings and stages, and do nothing.")
    ] = False,
) -> None:
    """Compare methods of alignment, with several training seeds each, by two judges."""
    with exit_codes(EXIT_CODES):
        if tables is not None:
            typer.echo("\n".join(tabulate(tables)))
            return
        config = override(recipe(RECIPES, name), settings or [])
        folder = (output or Path("build/study2") / config.name).resolve()
        study = Study(config, folder)
        typer.echo(describe(config))
        if show:
            typer.echo("\n".join(stage.name for stage in study.stages()))
            return
        claim_folder(folder, flatten(config), free=FREE)
        torch.set_num_threads(1)
        run_stages(study.stages(), folder / "locks")
        typer.echo("\n".join(["", *tabulate(folder / "result")]))


if __name__ == "__main__":
    quiet_libraries()
    typer.run(main)
