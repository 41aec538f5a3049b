"""A study of alignment methods: SFT, DPO, BATON and rounds of DPO from one start, side by side.

    python -m benchmarks.study                              # hours; resumable
    python -m benchmarks.study --set seeds=0 --show
    python -m benchmarks.study --recipe study-smoke         # every stage in a few steps

Pairs are made once; every method learns from them with each training seed; then all models, and the start,
are evaluated on the same prompts and seeds. In ``--output`` (`build/run/NAME`): `study.json`, `study.md` (the
tables), `preferences/`, `seed-S/` with one model per method, and `evaluation/`. Logged to MLflow: a parent
run, a child run for each stage. A study is no release, so it registers nothing.

Killed anywhere, the same command resumes. Seeds and methods may be added later: what is done stays.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import typer

from benchmarks.study_tables import figures_of, study_of, written_study
from services.environment import quiet_libraries
from services.files import write_atomically
from training.evaluation.config import (
    EvaluationConfig,
    Sampling,
    WorldPrompts,
    evaluation_mini,
    evaluation_smoke,
)
from training.evaluation.evaluate import comparison_pairs
from training.exits import EXIT_CODES, exit_codes
from training.finetuning.baton import BatonTraining
from training.finetuning.dpo import DpoTraining
from training.finetuning.sft import SftTraining
from training.loop.config import describe, flatten, override
from training.loop.run_folder import claim_folder
from training.preferences.pairs import PairsConfig
from training.preferences.pipeline import PreferencesConfig, preferences_smoke
from training.preferences.scores import ScoresConfig
from training.runs.recipes import baton_mini, baton_smoke, dpo_mini, dpo_smoke, recipe, sft_mini, sft_smoke
from training.runs.run_recipes import ranked_mini
from training.runs.stages import Program, evaluation_stage, finetuning_stage, preferences_stage
from training.tracking.runs import Tracker

Variant = Literal["sft", "dpo", "baton", "rounds"]
VARIANTS: Final[tuple[Variant, ...]] = get_args(Variant)
"""Methods, in the order of the tables."""
STUDY, TABLES = "study.json", "study.md"
BASE = "base"
"""Name of the start."""
FREE = ("processes", "seeds", "variants")
"""Settings that may change when a study is resumed."""
PRIMARY = "present_and_in_order"
"""The primary figure, if the truth of the prompts is known."""
PROGRAMS: Final[Mapping[Variant, Program]] = {"sft": "sft", "dpo": "dpo", "baton": "baton", "rounds": "dpo"}
BETWEEN: Final[tuple[tuple[Variant, Variant], ...]] = (("dpo", "sft"), ("rounds", "dpo"))
"""Methods that are compared with each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """Alignment methods side by side: from one start, on the same pairs, each with several training seeds.

    What links the stages (models, data sets, seeds, caches) is filled in from one to the next.
    """

    name: str
    """Name of the run, of its folder and in MLflow."""
    preferences: PreferencesConfig
    """Settings of the pairs that all methods learn from, sampled from the start."""
    sft: SftTraining
    """SFT on the chosen clips."""
    dpo: DpoTraining
    """DPO on the pairs; the reference is the start."""
    baton: BatonTraining
    """BATON on the pairs' clips, weighted by reward."""
    second_preferences: PreferencesConfig
    """Settings of the second round's pairs, sampled from DPO's model."""
    second: DpoTraining
    """DPO on them, from DPO's model, which is also the reference (CRPO, arXiv 2412.21037)."""
    evaluation: EvaluationConfig
    start: str = "mini-base"
    """URI of the model that is aligned."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds (`loop.seed`); each method is trained once with each."""
    variants: tuple[Variant, ...] = VARIANTS
    """Methods; `rounds` continues from `dpo`."""
    processes: int = 1
    """Processes of each training program, one per accelerator; more than one: by ``accelerate launch``."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}, must be 1 or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {_listed(self.seeds)}, must be different numbers, each 0 or more")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants is {_listed(self.variants)}, must name methods, each once")
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"variants has {_listed(unknown)}; there are {_listed(VARIANTS)}")
        if "rounds" in self.variants and "dpo" not in self.variants:
            raise ValueError(f"variants is {_listed(self.variants)}; rounds continues from dpo, so add dpo")


def run_mini_study() -> StudyRun:
    """`mini-base` by every method, three training seeds each, and all of them on the test split.

    The test split is used here and nowhere else: settings are chosen on the validation split.
    """
    preferences = ranked_mini(per_cluster=40)
    dpo = dpo_mini()
    return StudyRun(
        name="mini-study",
        preferences=preferences,
        sft=sft_mini(),
        dpo=dpo,
        baton=baton_mini(),
        second_preferences=replace(ranked_mini(per_cluster=10), pairs=replace(preferences.pairs, margin=2.0)),
        # As many passes over its fewer pairs as the first round made: 100 steps drifted far.
        second=replace(dpo, epochs=10.0, loop=replace(dpo.loop, warmup=5, decay=0.75)),
        evaluation=replace(
            evaluation_mini(),
            world=WorldPrompts(split="test", count=500),
            seeds=2,
            sampling=Sampling(num_inference_steps=12),
            set_resamples=100,
        ),
    )


def run_study_smoke() -> StudyRun:
    """Every stage in as few steps as possible. It learns nothing."""
    smoke = preferences_smoke()
    preferences = replace(
        smoke,
        candidates=replace(smoke.candidates, strategies=("1.2",)),
        scores=ScoresConfig(reward="mini:reward"),
        pairs=PairsConfig(mode="ranked", rank_by="reward"),
    )
    return StudyRun(
        name="study-smoke",
        preferences=preferences,
        sft=sft_smoke(),
        dpo=dpo_smoke(),
        baton=replace(baton_smoke(), reward="mini:reward"),
        second_preferences=preferences,
        second=dpo_smoke(),
        evaluation=evaluation_smoke(),
        seeds=(0,),
    )


RECIPES: Final[Mapping[str, Callable[[], StudyRun]]] = {
    "mini-study": run_mini_study,
    "study-smoke": run_study_smoke,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """The result of a study."""

    report: Mapping[str, Any]
    """Report of the evaluation."""
    study: Mapping[str, Any]
    """Content of study.json."""
    lines: tuple[str, ...]
    """The result, to print."""


def run_study(config: StudyRun, output: Path) -> StudyResult:
    """Run every stage, or what is left of it. Nothing is registered.

    Raises what the stages raise; `InvalidInputError` where another config began the study in `output`;
    `ServiceUnavailableError`, at the start, where the MLflow server does not answer.
    """
    output = output.resolve()
    claim_folder(output, flatten(config), free=FREE)
    variants = [variant for variant in VARIANTS if variant in config.variants]
    comparisons = (*config.evaluation.comparisons, *comparisons_of(config))
    # Faults of these are reported now, not after the trainings.
    comparison_pairs([BASE, *(name_of(v, seed) for seed in config.seeds for v in variants)], comparisons)
    announce = announcer(len(config.seeds) * len(variants) + 2)
    with Tracker(config.name, output / "tracking", params=flatten(config)) as tracker:
        announce("preferences")
        pairs = preferences_stage(
            "preferences", sampled_from(config.preferences, config.start), output / "preferences", tracker
        )
        models, trainings = {BASE: config.start}, dict[str, dict[str, Any]]()
        for seed in config.seeds:
            for variant in variants:
                announce(f"{variant}, seed {seed}")
                name = name_of(variant, seed)
                folder, trainings[name] = train_variant(config, variant, seed, pairs, output, tracker)
                models[name] = f"file:{folder}"
        announce("evaluation")
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
    """Train one method with one seed. Returns the model's folder and its training.json."""
    name, start, folder = name_of(variant, seed), config.start, output / f"seed-{seed}" / variant
    if variant == "rounds":
        start, folder = f"file:{output / f'seed-{seed}' / 'dpo'}", output / f"seed-{seed}" / "round-2" / "dpo"
        second = sampled_from(config.second_preferences, start, shift=1 + seed)
        pairs = preferences_stage(f"preferences-{name}", second, folder.with_name("preferences"), tracker)
    training = training_of(config, variant, seed, start, pairs, output / "latents")
    return folder, finetuning_stage(name, PROGRAMS[variant], training, folder, config.processes, tracker)


def sampled_from(config: PreferencesConfig, model: str, shift: int = 0) -> PreferencesConfig:
    """Return `config` for clips of `model`, with different noise for each `shift`."""
    source = replace(config.candidates.source, model=model)
    seed = config.candidates.seed + shift
    return replace(config, candidates=replace(config.candidates, source=source, seed=seed))


def training_of(
    config: StudyRun, variant: Variant, seed: int, start: str, pairs: Path, cache: Path
) -> SftTraining | DpoTraining | BatonTraining:
    """Return the settings of one training, from `start`, on `pairs`. All trainings share `cache`."""
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
    """Return the comparisons between methods, for the evaluation: of models of one training seed."""
    return tuple(
        f"{name_of(first, seed)}:{name_of(second, seed)}"
        for first, second in BETWEEN
        if first in config.variants and second in config.variants
        for seed in config.seeds
    )


def name_of(variant: Variant, seed: int) -> str:
    """Return the name of a model in the evaluation and in MLflow."""
    return f"{variant}-{seed}"


def announcer(total: int) -> Callable[[str], None]:
    """Return a function that prints which of `total` stages begins."""
    begun = 0

    def announce(stage: str) -> None:
        nonlocal begun
        begun += 1
        print(f"study: {stage} ({begun} of {total})", file=sys.stderr)

    return announce


def outcome(study: Mapping[str, Any]) -> list[str]:
    """Return a line for each method: the deciding figure, and that of the start."""
    before = study["figures"][BASE].get(PRIMARY)
    return [
        f"{variant}: {PRIMARY} {means[PRIMARY]:.3f}, the mean over training seeds; {BASE} {before:.3f}"
        for variant, means in study["means"].items()
        if before is not None and means.get(PRIMARY) is not None
    ]


def main(
    name: Annotated[
        str, typer.Option("--recipe", help="mini-study, or study-smoke: in a few steps.")
    ] = "mini-study",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a setting; repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of all stages.", show_default="build/run/NAME"),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings and do nothing.")] = False,
) -> None:
    """Compare SFT, DPO, BATON and rounds of DPO, with several training seeds each."""
    with exit_codes(EXIT_CODES):
        config = override(recipe(RECIPES, name), settings or [])
        typer.echo(describe(config))
        if not show:
            lines = run_study(config, output or Path("build/run") / config.name).lines
            typer.echo("\n".join(["", *lines]))


def _listed(items: tuple[object, ...] | list[Variant]) -> str:
    return ",".join(map(str, items)) or "empty"


if __name__ == "__main__":
    quiet_libraries()
    typer.run(main)
