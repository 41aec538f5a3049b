"""A study of methods, from pairs to tables: `python -m benchmarks.study --recipe study-smoke`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.study import (
    FREE,
    RECIPES,
    VARIANTS,
    comparisons_of,
    main,
    name_of,
    run_mini_study,
    run_study,
    run_study_smoke,
    sampled_from,
    training_of,
)
from benchmarks.study_tables import difference_table, figure_table, study_of, written_study
from services.errors import InvalidInputError
from training.finetuning.baton import BatonTraining
from training.finetuning.dpo import DpoTraining
from training.loop.config import flatten, override
from training.loop.run_folder import claim_folder


def test_the_smoke_study_ends_with_tables_and_is_not_done_twice(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = run_study_smoke(), tmp_path / "study"
    done = run_study(config, output)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("study: ")]
    assert told == [
        f"study: {stage} ({number} of 6)"
        for number, stage in enumerate(
            ["preferences", *(f"{variant}, seed 0" for variant in VARIANTS), "evaluation"], start=1
        )
    ]

    first = output / "seed-0"
    folders = {"sft": first / "sft", "dpo": first / "dpo", "baton": first / "baton"}
    folders["rounds"] = first / "round-2" / "dpo"
    reports = {name: json.loads((folder / "training.json").read_text()) for name, folder in folders.items()}
    assert {name: report["stage"] for name, report in reports.items()} == {
        "sft": "sft",
        "dpo": "dpo",
        "baton": "baton",
        "rounds": "dpo",
    }
    # The same pairs for all of the first round, others for the second, which starts from what DPO made.
    files = {name: report["data"]["files"] for name, report in reports.items()}
    assert files["sft"] == files["dpo"] == files["baton"] != files["rounds"]
    assert {report["parent"]["name"] for name, report in reports.items() if name != "rounds"} == {"mini-base"}
    assert reports["rounds"]["parent"]["name"] == "dpo-0"
    assert list((output / "latents").glob("*/*.safetensors"))
    assert not list(first.rglob("latents-*"))

    study = json.loads((output / "study.json").read_text())
    assert list(study["figures"]) == ["base", *(f"{variant}-0" for variant in VARIANTS)]
    assert study["figures"]["dpo-0"]["chosen_drift"] == reports["dpo"]["figures"]["chosen_drift"]
    assert study["means"]["baton"]["chosen_drift"] is None
    assert [(one["name"], one["against"]) for one in done.report["comparisons"]] == [
        *((f"{variant}-0", "base") for variant in VARIANTS),
        ("dpo-0", "sft-0"),
        ("rounds-0", "dpo-0"),
    ]
    tables = (output / "study.md").read_text()
    assert "| rounds-0 - dpo-0 |" in tables and "| baton-0 - base |" in tables
    assert "rounds-0 - dpo-0" in (output / "evaluation" / "report.md").read_text()
    assert str(output / "study.md") in done.lines

    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "milonga"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    children = {
        *(f"{variant}-0" for variant in VARIANTS),
        "preferences",
        "preferences-rounds-0",
        "evaluation",
    }
    assert runs.keys() == {"study-smoke", *children}
    parent = runs["study-smoke"]
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in children} == {parent.info.run_id}
    curve = client.get_metric_history(runs["baton-0"].info.run_id, "loss")
    assert [point.step for point in curve] == list(range(config.baton.loop.steps))
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"study.json", "study.md"}
    assert "mean/dpo/presence" in parent.data.metrics
    assert "dpo-0/presence" in runs["evaluation"].data.metrics
    assert not client.search_registered_models()

    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    made[output / "evaluation" / "report.json"] = (output / "evaluation" / "report.json").stat().st_mtime_ns
    again = run_study(replace(config, processes=1), output)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert again.study == done.study
    claim_folder(output, flatten(replace(config, seeds=(0, 1), variants=("sft",))), free=FREE)  # may differ
    with pytest.raises(InvalidInputError, match=r"second\.beta was"):
        run_study(replace(config, second=replace(config.second, beta=7.0)), output)


def test_what_links_the_stages_is_filled_in(tmp_path: Path) -> None:
    config = run_mini_study()
    pairs, cache = tmp_path / "pairs", tmp_path / "latents"
    for variant in VARIANTS:
        training = training_of(config, variant, 2, "file:start", pairs, cache)
        assert (training.name, training.start) == (f"{variant}-2", "file:start")
        assert (training.loop.seed, training.latents.cache) == (2, cache)
        assert training.data.pairs == (pairs,)
        assert isinstance(training, BatonTraining) == (variant == "baton")
        assert not isinstance(training, DpoTraining) or training.reference is None
    baton = training_of(config, "baton", 2, "file:start", pairs, cache)
    assert isinstance(baton, BatonTraining) and baton.data.scenes == config.baton.data.scenes
    first = sampled_from(config.preferences, config.start)
    rounds = [sampled_from(config.second_preferences, "file:dpo", 1 + seed) for seed in config.seeds]
    assert len({one.candidates.seed for one in (first, *rounds)}) == 1 + len(config.seeds)
    assert rounds[0].candidates.source.model == "file:dpo"
    assert comparisons_of(replace(config, seeds=(3,))) == ("dpo-3:sft-3", "rounds-3:dpo-3")
    assert comparisons_of(replace(config, variants=("sft", "baton"))) == ()


def test_the_test_split_is_the_studys() -> None:
    config = run_mini_study()
    assert config.evaluation.world.split == "test"
    assert config.second_preferences.captions.per_cluster < config.preferences.captions.per_cluster


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seeds=", "seeds is empty"),
        ("seeds=1,1", "seeds is 1,1"),
        ("seeds=-1", "seeds is -1"),
        ("variants=", "variants is empty"),
        ("variants=sft,sft", "variants is sft,sft"),
        ("variants=sft,rounds", "rounds continues from dpo"),
        ("variants=ppo", "variants: is 'ppo', must be 'sft', 'dpo', 'baton' or 'rounds'"),
        ("processes=0", "processes is 0"),
    ],
)
def test_studies_that_can_not_be_are_refused(setting: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        override(run_study_smoke(), [setting])


def test_a_comparison_with_nobody_is_refused_before_any_training(store: str, tmp_path: Path) -> None:
    config = run_study_smoke()
    config = replace(config, evaluation=replace(config.evaluation, comparisons=("dpo-0:dpo-1",)))
    with pytest.raises(InvalidInputError, match="no source is called dpo-1"):
        run_study(config, tmp_path / "study")
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_shows_the_settings_of_a_study(name: str) -> None:
    app = typer.Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, ["--recipe", name, "--set", "variants=sft,dpo", "--show"])
    assert f"name={name}\n" in shown.stdout and "variants=sft,dpo\n" in shown.stdout
    wrong = CliRunner().invoke(app, ["--recipe", name, "--set", "variant=sft"])
    assert wrong.exit_code == 2 and "known: variants" in wrong.stderr


def interval(value: float, margin: float | None = 0.05) -> dict[str, float | None]:
    low, high = (None, None) if margin is None else (value - margin, value + margin)
    return {"value": value, "low": low, "high": high, "count": 10}


def made_up_report() -> dict[str, Any]:
    """Of two methods and two seeds, one model after another as a study trains them."""
    names = ["base", "sft-0", "dpo-0", "sft-1", "dpo-1"]
    models = [
        {
            "name": name,
            "figures": {
                "all": {"presence": interval(0.5 + number / 10), "loudness_db": interval(-20.0)}
                | ({} if name == "dpo-1" else {"order_given_presence": interval(0.25)}),
                "temporal": {"presence": interval(0.0)},
            },
        }
        for number, name in enumerate(names)
    ]
    compared = [*((name, "base") for name in names[1:]), ("dpo-0", "sft-0"), ("dpo-1", "sft-1")]
    return {
        "prompts": {"count": 5, "clips": 10},
        "models": models,
        "comparisons": [
            {
                "name": name,
                "against": against,
                "differences": {"all": {"presence": interval(0.2), "fad.tagger": interval(-1.0, None)}},
            }
            for name, against in compared
        ],
        "warnings": ["few clips"],
        "settings": {"prompts": None, "world.split": "test"},
    }


def made_up_trainings() -> dict[str, dict[str, Any]]:
    figures = {"sft": {"loss": 0.1}, "dpo": {"chosen_drift": 0.012, "rejected_drift": 0.3}}
    return {
        name_of(variant, seed): {"stage": variant, "steps": 3, "data": {}, "figures": figures[variant]}
        for variant in ("sft", "dpo")
        for seed in (0, 1)
    }


def test_the_tables_have_each_method_with_each_seed_and_means() -> None:
    study = study_of(made_up_report(), made_up_trainings())
    header, rows = figure_table(study)
    assert header == ["model", "presence", "order_given_presence", "chosen_drift", "rejected_drift"]
    assert rows == [
        ["base", "0.500", "0.250", "–", "–"],
        ["sft-0", "0.600", "0.250", "–", "–"],
        ["sft-1", "0.800", "0.250", "–", "–"],
        ["dpo-0", "0.700", "0.250", "0.0120", "0.300"],
        ["dpo-1", "0.900", "–", "0.0120", "0.300"],
        ["sft, mean", "0.700", "0.250", "–", "–"],
        ["dpo, mean", "0.800", "–", "0.0120", "0.300"],  # a mean is of all seeds, or is none
    ]
    header, rows = difference_table(study, against_start=True)
    assert header == ["difference", "presence", "fad.tagger"]
    assert [row[0] for row in rows] == ["sft-0 - base", "sft-1 - base", "dpo-0 - base", "dpo-1 - base"]
    assert rows[0][1:] == ["0.200 [0.150, 0.250]", "-1.000"]
    _, between = difference_table(study, against_start=False)
    assert [row[0] for row in between] == ["dpo-0 - sft-0", "dpo-1 - sft-1"]


def test_the_study_is_written_down_with_what_to_be_careful_of() -> None:
    report = made_up_report()
    text = written_study("mini-study", study_of(report, made_up_trainings()))
    assert text.startswith("# Study: mini-study\n\n5 prompts of the sound world's test split, 10 clips")
    assert "* Careful: few clips.\n" in text
    assert "## Against each other" in text
    assert "* `presence` share of clips" in text and "`chosen_drift`" in text
    report["comparisons"] = report["comparisons"][:4]
    assert "## Against each other" not in written_study("", study_of(report, made_up_trainings()))
    json.dumps(study_of(report, made_up_trainings()), allow_nan=False)
