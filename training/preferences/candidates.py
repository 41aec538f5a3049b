"""Generate the candidate clips of every strategy, by an engine in this process or by a service.

``clips/`` holds a file per clip, named after all that determines it; ``manifest-I-of-N.jsonl`` a row for each
clip of shard I: `id`, `number`, `strategy`, `caption` (to score it against), `prompt` (that generated it),
`kind` (what is wrong with the prompt), `slot`, `seed`, `num_inference_steps`, `guidance_scale`, `duration`,
`sampling_rate`, `file`, `model`, `warnings` (on the prompt). An existing clip is never generated again.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import soundfile

from services.api.generation import ClipMaker, Generation
from services.api.model import ModelVersion
from services.client import OPTION_NAMES
from services.clip_folder import ClipFolder, generate_pinned
from services.errors import OutputError, invalid
from training.data.prompts import on_prompts, report_prompts
from training.data.store import (
    REPORT,
    Row,
    RowLog,
    claim,
    digest_of_value,
    file_digest,
    finish,
    read_json,
    read_rows,
    write_json,
    write_rows,
)
from training.loop.checks import ClipSeconds, Count, Factor, Seed, check_ranges
from training.loop.config import Plain, flatten
from training.loop.progress import progress
from training.preferences.captions import CAPTIONS, TEMPORAL, selected, temporal
from training.preferences.perturb import PERTURBED
from training.preferences.sources import Candidate, SourceConfig, model_of, open_source

CLIPS = "clips"
FREE: Final = tuple(f"source.{name}" for name in ("device", "threads", "in_flight", "server", *OPTION_NAMES))

STRATEGIES: Final = ("1.1", "1.2", "2", "3")
"""The strategies of section 4.1.1 of the paper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidatesConfig:
    """Settings of the clips to generate. The defaults are the paper's."""

    source: SourceConfig
    """Their generator."""
    strategies: tuple[str, ...] = STRATEGIES
    """1.1: one caption, several numbers of steps. 1.2: one caption, several seeds. 2 and 3: one clip of the
    caption, one of each perturbed caption."""
    steps: Count = 50
    """Denoising steps in strategies 1.2, 2 and 3."""
    varied_steps: tuple[Count, ...] = (5, 25, 50, 100)
    """Denoising steps of the clips of strategy 1.1."""
    clips: Count = 4
    """Clips of a caption in strategy 1.2."""
    guidance_scale: Factor = 3.0
    """Classifier-free guidance."""
    scheduler: str | None = None
    """None: the model's default."""
    duration: ClipSeconds | None = None
    """Seconds of each clip; none: the model's default."""
    seed: Seed = 0
    """Seed of the data set. Each clip's own is a function of it and of the clip's settings."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if unknown := sorted(set(self.strategies) - set(STRATEGIES)):
            raise ValueError(f"strategies has {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
        if ("1.2" in self.strategies and self.clips < 2) or (
            "1.1" in self.strategies and len(self.varied_steps) < 2
        ):
            raise ValueError(
                "strategies 1.1 and 1.2 choose among clips: clips and varied_steps need 2 or more"
            )


def plan(
    config: CandidatesConfig, captions: Sequence[str], perturbed: Sequence[Row], ordered: Sequence[str]
) -> list[Candidate]:
    """Return every clip to generate, in order.

    Args:
        config: the settings.
        captions: T1.
        perturbed: rows of ``perturbed.jsonl``.
        ordered: T2.
    """
    candidates: list[Candidate] = []

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
        seed = int(digest_of_value([config.seed, what])[:8], 16)
        candidates.append(Candidate(number=len(candidates), kind=kind, seed=seed, **what))

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
    return candidates


def candidates_identity(
    config: CandidatesConfig, captions: Path, perturbed: Path | None, model: ModelVersion
) -> dict[str, Plain]:
    """Return all that determines the result: settings, captions and the weights of `model`."""
    inputs: dict[str, Plain] = {
        f"input.{name}": file_digest(captions / name) for name in (CAPTIONS, TEMPORAL)
    }
    if perturbed is not None:
        inputs[f"input.{PERTURBED}"] = file_digest(perturbed / PERTURBED)
    return flatten(config) | inputs | {"model.digest": model.digest}


def make_candidates(
    config: CandidatesConfig,
    captions: Path,
    perturbed: Path | None,
    output: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    maker: ClipMaker | None = None,
    model: ModelVersion | None = None,
) -> Row:
    """Run shard `shard` (index from 0, count) of the stage in `output`; return its report.

    Shards may run in parallel, on one folder or on folders whose files are merged afterwards. `captions`
    and `perturbed` are the folders of the stages before; without the latter there are no strategies 2 and 3.
    `maker`, whose weights are `model`, replaces the config's source; it stays open.

    Raises:
        InvalidInputError: a shard that does not exist, or nothing to make.
        MilongaError: a clip could not be generated; those before it are kept.
        OutputError: the disk is full.
    """
    index, count = shard
    if not 0 <= index < count:
        raise invalid("shard", f"is {index} of {count}; must be 0 to {count - 1}")
    model = model or model_of(config.source)
    name = f"{index:05d}-of-{count:05d}"
    report = output / f"report-{name}.json"
    if complete := claim(output, candidates_identity(config, captions, perturbed, model), FREE):
        return read_json(report) if report.exists() else complete
    candidates = plan(
        config,
        selected(captions),
        [] if perturbed is None else read_rows(perturbed / PERTURBED),
        temporal(captions),
    )
    if not candidates:
        raise invalid(
            "strategies", f"{', '.join(config.strategies)} have nothing to make; give perturbed captions"
        )
    own = candidates[index::count]
    manifest = output / f"manifest-{name}.jsonl"
    rows = _make(config, own, model, output, manifest, maker)
    # By number, as an uninterrupted run would have written them.
    write_rows(manifest, rows)
    made: Row = {
        "clips": len(rows),
        "of": len(candidates),
        "by_strategy": dict(sorted(Counter(row["strategy"] for row in rows).items())),
        "captions": len({row["caption"] for row in rows}),
        "seconds": round(sum(row["duration"] for row in rows), 3),
        "model": asdict(model),
        **prompt_report(rows, model.name),
    }
    write_json(report, made)
    every = read_candidates(output, partly=True)
    if len(every) == len(candidates):
        prompts = prompt_report(every, model.name, quiet=True)
        try:
            finish(output, {"clips": len(candidates), "model": asdict(model), **prompts})
        except OutputError:
            # Two shards may end at the same moment, with the same report.
            if not (output / REPORT).exists():
                raise
    return read_json(report)


def read_candidates(folder: Path, *, partly: bool = False) -> list[Row]:
    """Read the rows of all shards, each clip once, by number.

    Raises `InvalidInputError` if shards are missing, unless `partly`.
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
    """Return the SHA-256 in hex over the rows, without warnings: those of a clip are lost with its maker."""
    rows = read_candidates(folder)
    return digest_of_value([{name: row[name] for name in row if name != "warnings"} for row in rows])


def prompt_report(rows: Sequence[Row], by: str, *, quiet: bool = False) -> dict[str, Any]:
    """Return the entry of a report on prompts that `by` does not read in full: `report_prompts`."""
    places = {row["prompt"]: f"clip {row['id']}" for row in reversed(rows)}
    warnings = {row["prompt"]: row["warnings"] for row in rows if row.get("warnings")}
    return report_prompts(places, warnings, by, quiet=quiet)


def _make(
    config: CandidatesConfig,
    candidates: Sequence[Candidate],
    model: ModelVersion,
    output: Path,
    manifest: Path,
    maker: ClipMaker | None,
) -> list[Row]:
    """Generate the missing `candidates`; return the rows of all, by number."""
    source = config.source
    folder: ClipFolder[Candidate] = ClipFolder(
        output, lambda candidate: [_file(_identity(candidate, model), source.encoding)]
    )
    with RowLog(manifest) as log, contextlib.ExitStack() as stack:
        by_identity = {_identity(candidate, model): candidate for candidate in candidates}
        rows = {row["id"]: row for row in log.rows if row["id"] in by_identity}

        def add(candidate: Candidate, warnings: Sequence[str] = ()) -> None:
            row = _row(candidate, _identity(candidate, model), model, folder.paths(candidate)[0], output)
            row["warnings"] = on_prompts(warnings)
            log.append(row)
            rows[row["id"]] = row

        unrecorded = [candidate for identity, candidate in by_identity.items() if identity not in rows]
        missing = folder.missing(unrecorded)
        left = set(missing)
        for candidate in unrecorded:
            # Killed between the clip and its row: the row follows from the file.
            if candidate not in left:
                add(candidate)
        stop = None
        if missing and maker is None:
            maker = open_source(source)
            stack.callback(maker.close)
            stop = maker.close

        def make(candidate: Candidate) -> Generation:
            assert maker is not None
            return generate_pinned(maker, model.digest, candidate.prompt, **candidate.options(source))

        with progress(total=len(candidates), initial=len(rows), desc="candidates", unit="clip") as bar:
            for candidate, made in folder.make(missing, make, source.in_flight, stop=stop):
                add(candidate, made.warnings)
                bar.update()
    return sorted(rows.values(), key=lambda row: int(row["number"]))


def _identity(candidate: Candidate, model: ModelVersion) -> str:
    return digest_of_value([candidate.settings(), model.digest])[:32]


def _file(identity: str, encoding: str) -> str:
    # Two letters a folder: 200,000 files in one are slow to list.
    return f"{CLIPS}/{identity[:2]}/{identity}.{encoding}"


def _row(candidate: Candidate, identity: str, model: ModelVersion, path: Path, output: Path) -> Row:
    """Return the row of a clip whose file is complete."""
    info = soundfile.info(str(path))
    return {
        "id": identity,
        "number": candidate.number,
        "strategy": candidate.strategy,
        "caption": candidate.caption,
        "prompt": candidate.prompt,
        "kind": candidate.kind,
        "slot": candidate.slot,
        "seed": candidate.seed,
        "num_inference_steps": candidate.num_inference_steps,
        "guidance_scale": candidate.guidance_scale,
        "duration": info.frames / info.samplerate,
        "sampling_rate": info.samplerate,
        "file": path.relative_to(output).as_posix(),
        "model": asdict(model),
    }


def _whole_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a manifest that may still be growing."""
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError:
            return
