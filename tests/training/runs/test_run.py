"""The whole loop, from candidates to a registered version: `milonga train run --recipe smoke`."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import pytest

from services.errors import InvalidInputError, MilongaError, ModelNotFoundError
from services.models.mini import mini_folder
from services.weights.registry import LOCAL_STORE
from services.weights.uri import resolve
from tests.training.runs.counting import Counts, counting
from training.loop.config import differences, flatten, override
from training.runs.run import LoopResult, headline, outcome, run_loop, settled_start
from training.runs.run_recipes import RUNS, run_align, run_mini, run_smoke
from training.runs.stages import launch
from training.tracking.register import register


@dataclass(frozen=True, kw_only=True, slots=True)
class Smoke:
    """One run of the recipe, and what it hashed."""

    output: Path
    result: LoopResult
    counts: Counts


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Smoke]:
    """The recipe, run with a registry and a cache of its own, in the folder where the tests then begin."""
    folder = tmp_path_factory.mktemp("smoke")
    shutil.copy(empty_store, folder / LOCAL_STORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MILONGA_CACHE", str(folder / "cache"))
        with counting() as counts:
            result = run_loop(run_smoke(), folder / "run")
        yield Smoke(output=folder / "run", result=result, counts=counts)


def test_the_smoke_recipe_ends_with_a_registered_challenger_and_is_not_done_twice(
    smoke: Smoke, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output, done = run_smoke(), smoke.output, smoke.result
    assert (done.registered.name, done.registered.version) == ("milonga-tango", "1")
    assert resolve("models:/milonga-tango@challenger").digest == done.registered.digest
    assert resolve("models:/milonga-reward@challenger").identity.version == "1"
    assert any("present_and_in_order" in line for line in done.lines)

    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "milonga"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {"smoke", "reward", "preferences", "sft", "dpo", "evaluation", "samples"} <= runs.keys()
    assert runs["dpo"].data.tags["mlflow.parentRunId"] == runs["smoke"].info.run_id
    curve = client.get_metric_history(runs["dpo"].info.run_id, "loss")
    assert [point.step for point in curve] == list(range(config.dpo.loop.steps))

    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    capsys.readouterr()
    again = run_loop(config, output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == made
    assert again.registered == done.registered

    with pytest.raises(InvalidInputError, match="rounds was 1, is 2"):
        run_loop(replace(config, rounds=2), output)


def test_a_run_hashes_each_model_folder_once(smoke: Smoke) -> None:
    assert smoke.counts.hashed
    assert not {folder: times for folder, times in smoke.counts.hashed.items() if times > 1}


def test_a_launched_program_that_fails_says_which(tmp_path: Path) -> None:
    with pytest.raises(MilongaError, match="dpo ended with exit code"):
        launch("dpo", replace(run_smoke().dpo, start="file:nowhere"), tmp_path / "dpo", 1)


@pytest.mark.parametrize("name", RUNS)
def test_every_recipe_of_the_loop_is_a_whole_config(name: str) -> None:
    config = RUNS[name]()
    assert config.samples
    assert config.trainings == {"mini-raft": ("sft",)}.get(name, config.trainings)
    assert (config.rounds > 1) == (name == "mini-raft")


@pytest.mark.parametrize("trainings", ["", "sft,sft", "ppo"])
def test_trainings_that_can_not_be_are_refused(trainings: str) -> None:
    with pytest.raises(InvalidInputError, match="trainings"):
        override(run_smoke(), [f"trainings={trainings}"])


def test_rounds_of_sft_each_sample_from_the_model_before(store: str, tmp_path: Path) -> None:
    config = run_smoke()
    scores = replace(config.preferences.scores, reward="mini:reward")
    preferences = replace(config.preferences, scores=scores)
    config = replace(config, preferences=preferences, trainings=("sft",), rounds=2, with_reward=False)
    run_loop(config, tmp_path / "run")
    reports = [
        json.loads((tmp_path / "run" / f"round-{number}" / "sft" / "training.json").read_text())
        for number in (1, 2)
    ]
    first = resolve(f"file:{tmp_path / 'run' / 'round-1' / 'sft'}")
    assert [report["stage"] for report in reports] == ["sft", "sft"]
    assert reports[0]["parent"]["name"] == "mini-base"
    assert reports[1]["parent"]["digest"] == first.digest
    (manifest,) = (tmp_path / "run" / "round-2" / "preferences").glob("candidates-*/manifest-*.jsonl")
    assert {json.loads(line)["model"]["digest"] for line in manifest.read_text().splitlines()} == {
        first.digest
    }
    assert not (tmp_path / "run" / "round-1" / "dpo").exists()


def test_the_training_job_runs_mini_and_needs_neither_a_service_nor_the_network() -> None:
    config = run_align()
    assert differences(flatten(run_mini()), flatten(config)) == ["name was mini, is align"]
    assert config.start == "mini-base"
    services = {name: value for name, value in flatten(config).items() if name.endswith("server")}
    assert services and not any(services.values())


def test_an_alias_counts_as_it_stood_when_the_run_began(store: str, tmp_path: Path) -> None:
    assert settled_start("mini-base", tmp_path) == "mini-base"
    assert not list(tmp_path.glob("*.txt"))
    with pytest.raises(ModelNotFoundError, match="milonga-tango@champion is not in the registry"):
        settled_start("models:/milonga-tango@champion", tmp_path)
    first, _ = register(mini_folder("mini-base"), alias="champion")
    assert settled_start("models:/milonga-tango@champion", tmp_path) == first.uri
    register(mini_folder("mini"), alias="champion")
    assert settled_start("models:/milonga-tango@champion", tmp_path) == first.uri
    assert resolve(first.uri).digest == first.digest


def test_the_outcome_tells_what_decides_and_leaves_out_what_is_not_there() -> None:
    figure = {"value": 0.1, "low": 0.05, "high": 0.15}
    differences = {"present_and_in_order": figure, "silent": {"value": 0.0, "low": None, "high": None}}
    report = {"comparisons": [{"differences": {"all": differences}}]}
    assert outcome(report) == ["present_and_in_order: +0.100 [+0.050, +0.150] against the start"]
    assert headline(report) == {
        "difference.present_and_in_order": 0.1,
        "difference.present_and_in_order.low": 0.05,
        "difference.present_and_in_order.high": 0.15,
        "difference.silent": 0.0,
    }
