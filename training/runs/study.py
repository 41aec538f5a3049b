"""A study of alignment methods: SFT, DPO, BATON and rounds of DPO from one start, side by side.

    milonga train run --recipe mini-study

Pairs are made once; every method learns from them with each training seed; then all models, and the start,
are heard on the same prompts and seeds. In ``--output``: `study.json`, `study.md` (the tables),
`preferences/`, `seed-S/` with a model a method, and `evaluation/`. Logged to MLflow: a parent run, a child a
stage. A study is no release, so it registers nothing.

Killed anywhere, the same call goes on. Seeds and methods may be added later: what is done stays.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from services.files import write_atomically
from training.evaluation.evaluate import compared_names
from training.finetuning.baton import BatonTraining
from training.finetuning.dpo import DpoTraining
from training.finetuning.sft import SftTraining
from training.loop.config import flatten
from training.loop.run_folder import claim_folder
from training.preferences.pipeline import PreferencesConfig
from training.runs.stages import Program, evaluation_stage, finetuning_stage, preferences_stage
from training.runs.study_recipes import VARIANTS, StudyRun, Variant
from training.runs.study_tables import figures_of, study_of, written_study
from training.tracking.runs import Tracker

STUDY, TABLES = "study.json", "study.md"
BASE = "base"
"""Name of the start."""
FREE = ("processes", "seeds", "variants")
"""Settings that may be others when a study is resumed."""
PRIMARY = "present_and_in_order"
"""The figure that decides, where the prompts' truth is known."""
PROGRAMS: Final[Mapping[Variant, Program]] = {"sft": "sft", "dpo": "dpo", "baton": "baton", "rounds": "dpo"}
BETWEEN: Final[tuple[tuple[Variant, Variant], ...]] = (("dpo", "sft"), ("rounds", "dpo"))
"""Methods that are compared with each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """What a study ended with."""

    report: Mapping[str, Any]
    """Of the evaluation."""
    study: Mapping[str, Any]
    """As study.json has it."""
    lines: tuple[str, ...]
    """The outcome, for people."""


def run_study(config: StudyRun, output: Path) -> StudyResult:
    """Run every stage, or what is left of it. Nothing is registered.

    Raises what the stages raise; `InvalidInputError` where another config began the study in `output`;
    `ServiceUnavailableError`, at the start, where the MLflow server does not answer.
    """
    output = output.resolve()
    claim_folder(output, flatten(config), free=FREE)
    variants = [variant for variant in VARIANTS if variant in config.variants]
    comparisons = (*config.evaluation.comparisons, *comparisons_of(config))
    # What is wrong with them is told now, not after the trainings.
    compared_names([BASE, *(name_of(v, seed) for seed in config.seeds for v in variants)], comparisons)
    tell = teller(len(config.seeds) * len(variants) + 2)
    with Tracker(config.name, output / "tracking", params=flatten(config)) as tracker:
        tell("preferences")
        pairs = preferences_stage(
            "preferences", sampled_from(config.preferences, config.start), output / "preferences", tracker
        )
        models, trainings = {BASE: config.start}, dict[str, dict[str, Any]]()
        for seed in config.seeds:
            for variant in variants:
                tell(f"{variant}, seed {seed}")
                name = name_of(variant, seed)
                folder, trainings[name] = train_variant(config, variant, seed, pairs, output, tracker)
                models[name] = f"file:{folder}"
        tell("evaluation")
        report = evaluation_stage(
            replace(config.evaluation, comparisons=comparisons),
            models,
            output / "evaluation",
            tracker,
            lambda report: figures_of(report, {}),
        )
        study = study_of(report, trainings)
        write_atomically(output / TABLES, written_study(config.name, study))
        write_atomically(output / STUDY, json.dumps(study, indent=1, allow_nan=False) + "\n")
        for file in (STUDY, TABLES):
            tracker.parent.log_artifact(output / file)
        tracker.parent.log_metrics({f"mean/{variant}": means for variant, means in study["means"].items()})
        lines = (*outcome(study), str(output / TABLES), tracker.hint)
    return StudyResult(report=report, study=study, lines=lines)


def train_variant(
    config: StudyRun, variant: Variant, seed: int, pairs: Path, output: Path, tracker: Tracker
) -> tuple[Path, dict[str, Any]]:
    """Train one method with one seed. Returns the model's folder and what stands in its training.json."""
    name, start, folder = name_of(variant, seed), config.start, output / f"seed-{seed}" / variant
    if variant == "rounds":
        start, folder = f"file:{output / f'seed-{seed}' / 'dpo'}", output / f"seed-{seed}" / "round-2" / "dpo"
        second = sampled_from(config.second_preferences, start, shift=1 + seed)
        pairs = preferences_stage(f"preferences-{name}", second, folder.with_name("preferences"), tracker)
    training = training_of(config, variant, seed, start, pairs, output / "latents")
    return folder, finetuning_stage(name, PROGRAMS[variant], training, folder, config.processes, tracker)


def sampled_from(config: PreferencesConfig, model: str, shift: int = 0) -> PreferencesConfig:
    """`config` with clips of `model`, whose noise is another for each `shift`."""
    source = replace(config.candidates.source, model=model)
    seed = config.candidates.seed + shift
    return replace(config, candidates=replace(config.candidates, source=source, seed=seed))


def training_of(
    config: StudyRun, variant: Variant, seed: int, start: str, pairs: Path, cache: Path
) -> SftTraining | DpoTraining | BatonTraining:
    """The settings of one training: the method's, from `start`, on `pairs`. All trainings share `cache`."""
    methods: Mapping[Variant, SftTraining | DpoTraining | BatonTraining] = {
        "sft": config.sft,
        "dpo": config.dpo,
        "baton": config.baton,
        "rounds": config.second,
    }
    training = methods[variant]
    linked: dict[str, Any] = {
        "name": name_of(variant, seed),
        "start": start,
        "data": replace(training.data, pairs=(pairs,)),
        "loop": replace(training.loop, seed=seed),
        "latents": replace(training.latents, cache=cache),
    }
    if isinstance(training, DpoTraining):
        linked["reference"] = None  # the start
    return replace(training, **linked)


def comparisons_of(config: StudyRun) -> tuple[str, ...]:
    """Those between methods, for the evaluation: of models of one training seed."""
    return tuple(
        f"{name_of(first, seed)}:{name_of(second, seed)}"
        for first, second in BETWEEN
        if first in config.variants and second in config.variants
        for seed in config.seeds
    )


def name_of(variant: Variant, seed: int) -> str:
    """Of a model, in the evaluation and in MLflow."""
    return f"{variant}-{seed}"


def teller(total: int) -> Callable[[str], None]:
    """A function that says on stderr which of `total` stages begins."""
    begun = 0

    def tell(stage: str) -> None:
        nonlocal begun
        begun += 1
        print(f"study: {stage} ({begun} of {total})", file=sys.stderr)

    return tell


def outcome(study: Mapping[str, Any]) -> list[str]:
    """One line for each method: the figure that decides, beside the start's."""
    before = study["figures"][BASE].get(PRIMARY)
    return [
        f"{variant}: {PRIMARY} {means[PRIMARY]:.3f}, the mean over training seeds; {BASE} {before:.3f}"
        for variant, means in study["means"].items()
        if before is not None and means.get(PRIMARY) is not None
    ]
