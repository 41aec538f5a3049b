"""The stages of a run, each logged as a child run.

Every stage is a program with a folder of its own. One that is done is skipped; one that was killed resumes.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from services.errors import MilongaError
from training.data.store import Row
from training.evaluation.config import EvaluationConfig
from training.evaluation.evaluate import evaluate, finished_evaluation
from training.finetuning.baton import train_baton
from training.finetuning.dpo import train_dpo
from training.finetuning.session import FineTuning
from training.finetuning.sft import train_sft
from training.loop.config import describe, flatten
from training.loop.run_folder import JOURNAL
from training.preferences.pipeline import PreferencesConfig, Stage, make_preferences
from training.reward.train import RewardTraining, train_reward
from training.tracking.runs import TrackedRun, Tracker

Program = Literal["reward", "sft", "dpo", "baton"]


def preferences_stage(name: str, config: PreferencesConfig, folder: Path, tracker: Tracker) -> Path:
    """Make preference pairs in `folder`, as the child run `name`; return the data set's folder."""
    with tracker.stage(name) as stage:

        def log(part: Stage, _: Path, report: Row) -> None:
            stage.log_metrics({f"{part}.{key}": v for key, v in report.items() if isinstance(v, int | float)})
            stage.log_bytes(f"{part}.json", json.dumps(report, indent=1).encode())

        folders = make_preferences(config, folder, on_stage=log)
        stage.log_dataset("pairs", folders["dataset"])
    return folders["dataset"]


def finetuning_stage(
    name: str, program: Program, config: FineTuning, folder: Path, processes: int, tracker: Tracker
) -> dict[str, Any]:
    """Fine-tune a denoiser into `folder`, as the child run `name`; return its training.json."""
    with tracker.stage(name) as stage:
        report = train(program, config, folder, processes, stage)
        stage.log_metrics({f"last.{figure}": value for figure, value in report["figures"].items()})
    return report


def evaluation_stage(
    config: EvaluationConfig,
    models: Mapping[str, str],
    folder: Path,
    tracker: Tracker,
    metrics: Callable[[Mapping[str, Any]], Mapping[str, object]],
) -> dict[str, Any]:
    """Compare models, URIs by name, with the first of them; `metrics` of the report go to the child run."""
    sources = [f"{name}={uri}" for name, uri in models.items()]
    with tracker.stage("evaluation") as stage:
        report = finished_evaluation(config, sources, folder) or evaluate(config, sources, folder)
        stage.log_metrics(metrics(report))
        for path in sorted(folder.iterdir()):
            if path.is_file():
                stage.log_artifact(path)
    return report


def train(
    program: Program, config: RewardTraining | FineTuning, folder: Path, processes: int, stage: TrackedRun
) -> dict[str, Any]:
    """Run a training program, in this process or in several; return its report. `stage` gets its curves."""
    stage.log_params(flatten(config))
    stage.follow(folder.with_name(f"{folder.name}.run") / JOURNAL)
    if processes > 1:
        launch(program, config, folder, processes)
    # After a launch this finds all done, and reads the report.
    programs: dict[Program, Any] = {
        "reward": train_reward,
        "sft": train_sft,
        "dpo": train_dpo,
        "baton": train_baton,
    }
    report: dict[str, Any] = programs[program](config, folder)
    return report


def launch(program: Program, config: object, folder: Path, processes: int) -> None:
    """Run a training program by ``accelerate launch``. Raises `MilongaError` if it fails."""
    settings = [word for line in describe(config).splitlines() for word in ("--set", line)]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)),
        *("-m", "services.cli", "train", program, "--recipe", "smoke", "--output", str(folder), *settings),
    ]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise MilongaError(f"{program} ended with exit code {code}; see its output above")
