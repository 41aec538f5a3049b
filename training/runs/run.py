"""The whole loop: reward ▸ captions ▸ candidates ▸ scores ▸ pairs ▸ SFT, DPO ▸ evaluation ▸ register.

    milonga train run --recipe mini

Each stage is a program with a folder of its own. Here they run in order, and are logged to MLflow: a parent
run, a child run for each stage. Killed anywhere, the same call resumes, and skips the stages that are done.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from services.files import write_atomically
from services.local import open_clip_maker
from services.weights.registry import RegisteredVersion
from services.weights.uri import ModelURI, ResolvedModel, resolve
from training.evaluation.evaluate import comparison_pairs
from training.finetuning.dpo import DpoTraining
from training.finetuning.session import PairData
from training.finetuning.sft import SftTraining
from training.loop.config import flatten
from training.loop.run_folder import claim_folder
from training.preferences.candidates import FREE as CANDIDATES_FREE
from training.preferences.scores import FREE as SCORES_FREE
from training.preferences.scores import ScoresConfig
from training.runs.ratings import check_ratings, rated_files, with_ratings
from training.runs.run_recipes import LoopRun
from training.runs.stages import evaluation_stage, finetuning_stage, preferences_stage, train
from training.tracking.register import Provenance, register
from training.tracking.runs import Tracker, data_digest

FREE = (
    *("processes", "alias", "samples"),
    *(f"preferences.candidates.{name}" for name in CANDIDATES_FREE),
    *(f"preferences.scores.{name}" for name in SCORES_FREE),
)
"""Settings that may change when a run is resumed."""
PRIMARY = "present_and_in_order"
"""The primary figure, if the truth of the prompts is known."""
SEED = 7
"""Seed of the samples."""
START = "start.txt"
"""File with the run's start, if that was a registered version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopResult:
    """The result of a run."""

    registered: RegisteredVersion
    lines: tuple[str, ...]
    """Lines to print: the figures, the version, and where to see the run."""


def run_loop(config: LoopRun, output: Path) -> LoopResult:
    """Run every stage that is not complete.

    Raises the errors of the stages; `InvalidInputError` if another config began the run in `output`;
    `ServiceUnavailableError`, at the start, if the MLflow server does not answer.
    """
    output = output.resolve()
    check_ratings(config.preferences.ratings)  # before the folder is bound to it
    claim_folder(output, flatten(config), free=FREE)
    comparison_pairs(
        ("base", "aligned"), config.evaluation.comparisons
    )  # wrong ones are reported now, not at the end
    params = flatten(config)
    config = replace(config, start=settled_start(config.start, output))
    rated: tuple[Path, ...] = ()
    if (ratings := config.preferences.ratings) is not None:
        rated = rated_files(ratings, output / "ratings")
        if config.with_reward:
            config = replace(config, reward=with_ratings(config.reward, ratings, output / "ratings"))
    with Tracker(config.name, output / "tracking", params=params) as tracker:
        scores = reward_stage(config, output, tracker) if config.with_reward else config.preferences.scores
        policy, data = config.start, dict[str, str]()
        for number in range(config.rounds):
            policy, digest = align(
                config, policy, scores, output / f"round-{number + 1}", number, tracker, rated
            )
            data[f"round-{number + 1}"] = digest
        data |= {f"ratings/{path.name}": data_digest(path) for path in rated}
        models = {"base": config.start, "aligned": policy}
        report = evaluation_stage(config.evaluation, models, output / "evaluation", tracker, headline)
        aligned = resolve(policy)
        log_samples(config, aligned, tracker)
        registered, _ = register(
            aligned,
            alias=config.alias,
            provenance=Provenance(
                parent=config.start, data=data, metrics=headline(report), run_id=tracker.run_id
            ),
        )
        tracker.parent.log_metrics(headline(report))
        lines = (*outcome(report), f"{registered.uri}  {config.alias}", tracker.hint)
    return LoopResult(registered=registered, lines=lines)


def settled_start(uri: str, output: Path) -> str:
    """Return `uri`; in place of an alias, the version that it pointed to when the run in `output` began.

    Stages resolve it hours apart, and again after a pod was lost. Raises as `resolve`.
    """
    if ModelURI.parse(uri).scheme != "models":
        return uri
    path = output / START
    if not path.exists():
        found = resolve(uri)
        version = found.identity
        write_atomically(path, f"models:/{version.name}/{version.version}#{version.digest}\n")
    return path.read_text(encoding="utf-8").strip()


def reward_stage(config: LoopRun, output: Path, tracker: Tracker) -> ScoresConfig:
    """Train and register the reward model; return the config of the scores that uses it."""
    folder = output / "reward"
    with tracker.stage("reward") as stage:
        report = train("reward", config.reward, folder, config.processes, stage)
        stage.log_metrics({"pair_accuracy": report["pair_accuracy"]["all"]["value"]})
        for path in sorted(folder.glob("*.png")):
            stage.log_artifact(path)
    register(
        folder, alias=config.alias, clap=config.reward.clap, provenance=Provenance(run_id=tracker.run_id)
    )
    return replace(config.preferences.scores, reward=f"file:{folder}", clap=config.reward.clap)


def align(
    config: LoopRun,
    policy: str,
    scores: ScoresConfig,
    folder: Path,
    number: int,
    tracker: Tracker,
    rated: tuple[Path, ...] = (),
) -> tuple[str, str]:
    """Run one round: sample from `policy`, rank, train. Return the new policy's URI and the data's digest.

    `rated` are files of pairs that people rated, from which the training learns too.
    """
    candidates = config.preferences.candidates
    preferences = replace(
        config.preferences,
        scores=scores,
        candidates=replace(
            candidates, source=replace(candidates.source, model=policy), seed=candidates.seed + number
        ),
    )
    suffix = "" if config.rounds == 1 else f"-{number + 1}"
    pairs = preferences_stage(f"preferences{suffix}", preferences, folder / "preferences", tracker)
    data = PairData(pairs=(pairs, *rated))
    model = policy
    for stage in config.trainings:
        training: SftTraining | DpoTraining = replace(config.sft, start=model, data=data)
        if stage == "dpo":
            reference = None if model == policy else policy
            training = replace(config.dpo, start=model, reference=reference, data=data)
        finetuning_stage(f"{stage}{suffix}", stage, training, folder / stage, config.processes, tracker)
        model = f"file:{folder / stage}"
    return model, data_digest(pairs)


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the differences of the aligned model to the start, over all prompts."""
    differences = report["comparisons"][0]["differences"]["all"]
    parts = (("", "value"), (".low", "low"), (".high", "high"))
    return {
        f"difference.{name}{suffix}": figure[key]
        for name, figure in differences.items()
        for suffix, key in parts
        if figure.get(key) is not None
    }


def outcome(report: Mapping[str, Any]) -> list[str]:
    """Return a line for each of the deciding figures."""
    differences = report["comparisons"][0]["differences"]["all"]
    names = [name for name in (PRIMARY, "presence", "order_given_presence", "reward") if name in differences]
    return [
        f"{name}: {figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}] against the start"
        for name in names
        for figure in [differences[name]]
    ]


def log_samples(config: LoopRun, aligned: ResolvedModel, tracker: Tracker) -> None:
    """Log clips of a few prompts that both models generate from the same noise."""
    with tracker.stage("samples") as stage:
        for name, model in (("base", resolve(config.start)), ("aligned", aligned)):
            with contextlib.closing(open_clip_maker(model, device="cpu")) as maker:
                for number, prompt in enumerate(config.samples):
                    (clip,) = maker.generate(prompt, seed=SEED, encoding="float32").clips
                    stage.log_audio(f"{number}-{name}", clip.waveform(), clip.sampling_rate, prompt)
