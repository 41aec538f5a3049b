"""Clips to choose from: every strategy's, made by an engine in this process or by a service.

``clips/`` holds one file a clip, named after all that determines it; ``manifest-I-of-N.jsonl`` a row for each
clip of shard I: `id`, `number`, `strategy`, `caption` (what it is judged against), `prompt` (what it was made
of), `kind` (what is wrong with the prompt), `slot`, `seed`, `num_inference_steps`, `guidance_scale`,
`duration`, `sampling_rate`, `file`, `model`. A clip that is there is never made again; a row is there or not.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import soundfile

from services.client import ModelVersion
from services.errors import OutputError
from training.data.store import (
    REPORT,
    Row,
    RowLog,
    claim,
    digest_of,
    file_digest,
    finish,
    invalid,
    read_json,
    read_rows,
    side_by_side,
    write_json,
    write_rows,
)
from training.loop.config import Plain, flatten
from training.loop.progress import progress
from training.loop.run_folder import write_atomically
from training.preferences.captions import CAPTIONS, TEMPORAL, selected, temporal
from training.preferences.perturb import PERTURBED
from training.preferences.sources import ClipSource, Job, SourceConfig, model_of, open_source

CLIPS = "clips"
FREE: Final = ("source.device", "source.threads", "source.in_flight", "source.timeout", "source.server")

STRATEGIES: Final = ("1.1", "1.2", "2", "3")
"""The strategies of section 4.1.1 of the paper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidatesConfig:
    """Which clips are made, of what and by whom. The numbers are the paper's."""

    source: SourceConfig
    """Who makes them."""
    strategies: tuple[str, ...] = STRATEGIES
    """1.1: one caption, several numbers of steps. 1.2: one caption, several seeds. 2 and 3: one clip of the
    caption, one of each perturbed caption."""
    steps: int = 50
    """Denoising steps in strategies 1.2, 2 and 3."""
    varied_steps: tuple[int, ...] = (5, 25, 50, 100)
    """Denoising steps of the clips of strategy 1.1."""
    clips: int = 4
    """Clips of a caption in strategy 1.2."""
    guidance_scale: float = 3.0
    """Classifier-free guidance."""
    scheduler: str | None = None
    """None: the model's default."""
    duration: float | None = None
    """Seconds of each clip; none: the model's default."""
    seed: int = 0
    """Of all clips; each has one of its own, a function of this one and of what the clip is."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.strategies) - set(STRATEGIES)):
            raise ValueError(f"strategies has {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
        if min(self.steps, *self.varied_steps) < 1:
            raise ValueError("steps and varied_steps must be 1 or more")
        if ("1.2" in self.strategies and self.clips < 2) or (
            "1.1" in self.strategies and len(self.varied_steps) < 2
        ):
            raise ValueError(
                "strategies 1.1 and 1.2 choose among clips: clips and varied_steps need 2 or more"
            )


def plan(
    config: CandidatesConfig, captions: Sequence[str], perturbed: Sequence[Row], ordered: Sequence[str]
) -> list[Job]:
    """Every clip to make, in order.

    Args:
        config: the settings.
        captions: T1.
        perturbed: rows of ``perturbed.jsonl``.
        ordered: T2.
    """
    jobs: list[Job] = []

    def add(strategy: str, caption: str, prompt: str, kind: str | None, slot: int, steps: int) -> None:
        what: dict[str, Any] = {
            "strategy": strategy,
            "caption": caption,
            "prompt": prompt,
            "slot": slot,
            "num_inference_steps": steps,
            "guidance_scale": config.guidance_scale,
            "scheduler": config.scheduler,
            "duration": config.duration,
        }
        seed = int(digest_of([config.seed, what])[:8], 16)
        jobs.append(Job(number=len(jobs), kind=kind, seed=seed, **what))

    wrong: dict[tuple[str, str], list[Row]] = {}
    for row in perturbed:
        wrong.setdefault((row["strategy"], row["caption"]), []).append(row)
    for strategy in config.strategies:
        for caption in ordered if strategy == "3" else captions:
            if strategy == "1.1":
                for slot, steps in enumerate(config.varied_steps):
                    add(strategy, caption, caption, None, slot, steps)
            elif strategy == "1.2":
                for slot in range(config.clips):
                    add(strategy, caption, caption, None, slot, config.steps)
            elif rows := wrong.get((strategy, caption)):
                add(strategy, caption, caption, None, 0, config.steps)
                for slot, row in enumerate(rows, start=1):
                    add(strategy, caption, row["perturbed"], row["kind"], slot, config.steps)
    return jobs


def candidates_identity(
    config: CandidatesConfig, captions: Path, perturbed: Path | None, model: ModelVersion | None = None
) -> dict[str, Plain]:
    """What the outcome depends on. `model`: of the source, where it is open."""
    inputs: dict[str, Plain] = {
        f"input.{name}": file_digest(captions / name) for name in (CAPTIONS, TEMPORAL)
    }
    if perturbed is not None:
        inputs[f"input.{PERTURBED}"] = file_digest(perturbed / PERTURBED)
    return flatten(config) | inputs | {"model.digest": (model or model_of(config.source)).digest}


def make_candidates(
    config: CandidatesConfig,
    captions: Path,
    perturbed: Path | None,
    output: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    source: ClipSource | None = None,
) -> Row:
    """Run shard `shard` (index from 0, count) of the stage in `output`; return its report.

    Shards may run at once, on one folder or on folders whose files are put together afterwards. `captions`
    and `perturbed` are the folders of the stages before; without the latter there are no strategies 2 and 3.
    `source` stands in for the one that the config names; it stays open.

    Raises:
        InvalidInputError: a shard that does not exist, or nothing to make.
        MilongaError: a clip could not be made; those that were are kept.
        OutputError: the disk is full.
    """
    index, count = shard
    if not 0 <= index < count:
        raise invalid("shard", f"is {index} of {count}; must be 0 to {count - 1}")
    model = source.model if source is not None else model_of(config.source)
    name = f"{index:05d}-of-{count:05d}"
    report = output / f"report-{name}.json"
    if complete := claim(output, candidates_identity(config, captions, perturbed, model), FREE):
        return read_json(report) if report.exists() else complete
    jobs = plan(
        config,
        selected(captions),
        [] if perturbed is None else read_rows(perturbed / PERTURBED),
        temporal(captions),
    )
    if not jobs:
        raise invalid(
            "strategies", f"{', '.join(config.strategies)} have nothing to make; give perturbed captions"
        )
    own = jobs[index::count]
    manifest = output / f"manifest-{name}.jsonl"
    rows = _make(config, own, model, output, manifest, source)
    # By number, as an unbroken run would have written them whatever was done first.
    write_rows(manifest, rows)
    made: Row = {
        "clips": len(rows),
        "of": len(jobs),
        "by_strategy": dict(sorted(Counter(row["strategy"] for row in rows).items())),
        "captions": len({row["caption"] for row in rows}),
        "seconds": round(sum(row["duration"] for row in rows), 3),
        "model": asdict(model),
    }
    write_json(report, made)
    if len(read_candidates(output, partly=True)) == len(jobs):
        try:
            finish(output, {"clips": len(jobs), "model": asdict(model)})
        except OutputError:
            # Two shards may end at the same moment, and say the same.
            if not (output / REPORT).exists():
                raise
    return read_json(report)


def read_candidates(folder: Path, *, partly: bool = False) -> list[Row]:
    """The rows of all shards, each clip once, by number.

    Raises `InvalidInputError` where shards are missing, unless `partly`.
    """
    found: dict[int, Row] = {}
    for path in sorted(folder.glob("manifest-*.jsonl")):
        for row in _whole_rows(path):
            found.setdefault(row["number"], row)
    if not partly and not (folder / REPORT).exists():
        raise invalid(
            "candidates",
            f"{folder} holds {len(found)} clips and is not complete; run the stage, or its other shards",
        )
    return [found[number] for number in sorted(found)]


def candidates_digest(folder: Path) -> str:
    """SHA-256 in hex over the rows."""
    return digest_of(read_candidates(folder))


def _make(
    config: CandidatesConfig,
    jobs: Sequence[Job],
    model: ModelVersion,
    output: Path,
    manifest: Path,
    source: ClipSource | None,
) -> list[Row]:
    """Make what is missing of `jobs`; the rows of all, by number."""
    opened: ClipSource | None = None
    encoding = config.source.encoding
    with RowLog(manifest) as log:
        wanted = {_identity(job, model): job for job in jobs}
        rows = {row["id"]: row for row in log.rows if row["id"] in wanted}
        missing = []
        for identity, job in wanted.items():
            if identity in rows:
                continue
            # Killed between the clip and its row: the row follows from the file.
            row = _row(job, identity, model, output, encoding)
            if row is None:
                missing.append((identity, job))
            else:
                log.append(row)
                rows[identity] = row
        if missing and source is None:
            source = opened = open_source(config.source)
        if opened is not None and opened.model.digest != model.digest:
            opened.close()
            raise invalid("source", f"serves {opened.model.digest} now, and served {model.digest}; run again")

        def work(item: tuple[str, Job]) -> Row:
            identity, job = item
            assert source is not None
            write_atomically(output / _file(identity, encoding), source.make(job))
            row = _row(job, identity, model, output, encoding)
            assert row is not None
            return row

        try:
            with progress(total=len(jobs), initial=len(rows), desc="candidates", unit="clip") as bar:
                stop = None if opened is None else opened.close
                for (identity, _), row in side_by_side(work, missing, config.source.in_flight, stop):
                    log.append(row)
                    rows[identity] = row
                    bar.update()
        finally:
            if opened is not None:
                opened.close()
    return sorted(rows.values(), key=lambda row: int(row["number"]))


def _identity(job: Job, model: ModelVersion) -> str:
    return digest_of([job.settings(), model.digest])[:32]


def _file(identity: str, encoding: str) -> str:
    # Two letters a folder: 200,000 files in one are slow to list.
    return f"{CLIPS}/{identity[:2]}/{identity}.{encoding}"


def _row(job: Job, identity: str, model: ModelVersion, output: Path, encoding: str) -> Row | None:
    """The row of a clip whose file is there and whole; None where it is not."""
    file = _file(identity, encoding)
    try:
        info = soundfile.info(str(output / file))
    except (OSError, RuntimeError):
        return None
    if not info.frames:
        return None
    return {
        "id": identity,
        "number": job.number,
        "strategy": job.strategy,
        "caption": job.caption,
        "prompt": job.prompt,
        "kind": job.kind,
        "slot": job.slot,
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "duration": info.frames / info.samplerate,
        "sampling_rate": info.samplerate,
        "file": file,
        "model": asdict(model),
    }


def _whole_rows(path: Path) -> Iterator[Row]:
    """The rows of a manifest that may still be growing."""
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError:
            return
