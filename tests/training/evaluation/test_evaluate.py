"""`milonga train evaluate` with tiny models: files, cache, warnings and errors."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from services.api.generation import Event, GenerationRequest
from services.engine import Engine, Handle
from services.errors import InvalidInputError, ModelNotFoundError
from services.models.manifest import verify_manifest, write_manifest
from services.models.mini.tagger import EventTagger
from tests.tiny import tiny_clap, tiny_pipeline, tiny_reward
from training.commands.evaluate import evaluate as command
from training.data.examples import FileClip
from training.evaluation.config import EvaluationConfig, Sampling, WorldPrompts
from training.evaluation.evaluate import comparison_pairs, evaluate, finished_evaluation
from training.evaluation.events import EVENT_METRICS
from training.evaluation.plots import distribution_plot, spectrogram_sheet
from training.soundworld.synthesis import CLASSES

PROMPTS = ("a dog barks", "rain falls while a dog barks", "a bell rings then a cat sings", "a siren wails")


def saved(folder: Path, model: Any) -> str:
    (model.save_pretrained if hasattr(model, "save_pretrained") else model.save)(folder)
    write_manifest(folder, name=folder.name, version="1", license="Apache-2.0")
    return f"file:{folder}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URIs of tiny models."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    found = {
        "first": saved(folder / "first", tiny_pipeline(0)),
        "second": saved(folder / "second", tiny_pipeline(1)),
        "clap": saved(folder / "clap", tiny_clap()),
        "tagger": saved(folder / "tagger", EventTagger(classes=list(CLASSES), width=8, hidden=4)),
    }
    digest = verify_manifest(folder / "clap").digest
    return found | {"reward": saved(folder / "reward", tiny_reward(tiny_clap(), digest))}


@pytest.fixture(scope="module")
def config(models: dict[str, str]) -> EvaluationConfig:
    return EvaluationConfig(
        name="tiny",
        world=WorldPrompts(count=6),
        seeds=2,
        sampling=Sampling(num_inference_steps=2),
        batch=4,
        device="cpu",
        scorers=(f"tiny={models['clap']}",),
        reward=models["reward"],
        reward_clap=models["clap"],
        embedders=(f"tagger:{models['tagger']}", f"clap:{models['clap']}"),
        judge=models["tagger"],
        set_resamples=4,
        sheet=2,
    )


@pytest.fixture(scope="module")
def evaluated(
    config: EvaluationConfig, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The output and the report of two models."""
    output = tmp_path_factory.mktemp("evaluation")
    return output, evaluate(config, [models["first"], f"other={models['second']}"], output)


def clip_folder(folder: Path, *, prompts: tuple[str, ...] = PROMPTS, seed: int = 0, clips: int = 1) -> Path:
    """Write a folder as `milonga generate --prompts` does."""
    folder.mkdir()
    random = np.random.RandomState(seed)
    rows = []
    for number, prompt in enumerate(prompts):
        for clip in range(clips):
            name = f"{number}-{clip}.wav"
            soundfile.write(folder / name, random.randn(12_000) * 0.1, 16_000)
            rows.append({"location": name, "captions": prompt, "seed": clip, "model": {"name": "elsewhere"}})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_prompts_that_models_or_scorers_do_not_read_are_counted_once(
    config: EvaluationConfig, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("caption\na dog barks\nLe chien aboie\n")
    small = replace(config, prompts=prompts, seeds=1, judge=None, set_resamples=0, sheet=0)
    report = evaluate(small, [models["first"], f"other={models['second']}"], tmp_path / "report")
    found = report["prompt_warnings"]
    assert (found["prompts"], found["with_warnings"]) == (2, 1)
    assert found["examples"][0]["row"] == "prompts.csv:3"
    (line,) = [one for one in report["warnings"] if "not read in full" in one]
    assert line.startswith(
        "1 of 2 prompts are not read in full by models and scorers; the first: prompts.csv:3"
    )
    assert capsys.readouterr().err.count("not read in full") == 1


def test_the_report_has_all_metrics_with_intervals(evaluated: tuple[Path, dict[str, Any]]) -> None:
    output, report = evaluated
    assert json.loads((output / "report.json").read_text()) == report
    assert [model["name"] for model in report["models"]] == ["first", "other"]
    assert report["prompts"]["clips"] == 12
    figures = report["models"][0]["figures"]["all"]
    expected = {
        "clap.tiny",
        "reward",
        "silent",
        "clipped",
        "overshoot",
        "loudness_db",
        "kl.tagger",
        *EVENT_METRICS,
    }
    expected |= {"fad.tagger", "kad.tagger", "inception.tagger", "fad.clap", "kad.clap"}
    undefined = {"order_given_presence", "reversed_given_presence", "simultaneous_given_presence"}
    assert expected - figures.keys() <= undefined  # none present
    assert figures.keys() <= expected
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values())
    assert figures["inception.tagger"]["value"] >= 1
    assert figures["fad.tagger"]["value"] > 0
    assert report["models"][0]["model"]["digest"].startswith("sha256:")
    assert report["heard_by"].keys() == {"clap.tiny", "reward", "judge", "space.tagger", "space.clap"}
    assert report["settings"]["sampling.num_inference_steps"] == 2


def test_differences_are_those_of_the_metrics(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, report = evaluated
    (comparison,) = report["comparisons"]
    assert (comparison["name"], comparison["against"]) == ("other", "first")
    for split, differences in comparison["differences"].items():
        first, second = (model["figures"][split] for model in report["models"])
        for name, difference in differences.items():
            assert difference["value"] == pytest.approx(
                second[name]["value"] - first[name]["value"], abs=1e-9
            )
    assert any(difference["value"] for difference in comparison["differences"]["all"].values())


def test_further_comparisons_are_added_to_those_with_the_first(
    config: EvaluationConfig, models: dict[str, str], tmp_path: Path
) -> None:
    light = replace(config, embedders=(), reward=None, judge=None, sheet=0, comparisons=("third:second",))
    sources = [models["first"], models["second"], f"third={models['first']}"]
    report = evaluate(light, sources, tmp_path / "out")
    compared = {(one["name"], one["against"]): one["differences"] for one in report["comparisons"]}
    assert list(compared) == [("second", "first"), ("third", "first"), ("third", "second")]
    for name, figure in compared["third", "second"]["all"].items():  # the third is the first once more
        assert figure["value"] == pytest.approx(-compared["second", "first"]["all"][name]["value"])
        assert figure["low"] == pytest.approx(-compared["second", "first"]["all"][name]["high"])
    header = "| figure | second - first | third - first | third - second |"
    assert header in (tmp_path / "out" / "report.md").read_text()

    assert finished_evaluation(light, sources, tmp_path / "out") == report
    assert finished_evaluation(replace(light, seeds=1), sources, tmp_path / "out") is None
    assert finished_evaluation(light, sources[:2], tmp_path / "out") is None
    assert finished_evaluation(light, [*sources[1::-1], sources[2]], tmp_path / "out") is None
    assert finished_evaluation(light, sources, tmp_path / "elsewhere") is None
    assert finished_evaluation(light, ["no-such-model"], tmp_path / "elsewhere") is None  # opens nothing


def test_invalid_comparisons_are_refused_before_any_clip_is_generated(
    config: EvaluationConfig, models: dict[str, str], tmp_path: Path
) -> None:
    assert comparison_pairs(["a", "b", "c"], ["c:b", "b:a", "a:b"]) == [
        ("b", "a"),
        ("c", "a"),
        ("c", "b"),
        ("a", "b"),
    ]
    wrong = replace(config, comparisons=("second:thrid",))
    with pytest.raises(InvalidInputError, match="no source is called thrid; there are first, second"):
        evaluate(wrong, [models["first"], models["second"]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for text in ("second", "second:", ":first", "first:first"):
        with pytest.raises(ValueError, match="must be NAME:AGAINST"):
            replace(config, comparisons=(text,))


def test_too_few_clips_give_a_warning(
    evaluated: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = evaluated
    assert any("fad.clap needs 32 clips" in warning for warning in report["warnings"])
    assert any(
        "fad.tagger needs 16 clips" in warning and "all 6" in warning for warning in report["warnings"]
    )


def test_tables_and_plots(evaluated: tuple[Path, dict[str, Any]]) -> None:
    output, report = evaluated
    text = (output / "report.md").read_text()
    assert "| figure | first | other |" in text
    assert "| figure | other - first |" in text
    assert "## Non-temporal" in text
    assert "nan" not in text.lower()
    for name in ("distributions.png", "spectrograms.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 200
    rows = [json.loads(line) for line in (output / "clips.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert all("presence" in row["figures"] for row in rows)
    # Some prompts have no word that the tiny scorers know.
    scored = [row["figures"] for row in rows if row["model"] == "first" and "clap.tiny" in row["figures"]]
    assert 0 < len(scored) < 12
    assert all("reward" in figures for figures in scored)
    assert all(
        (output / "clips" / Path(row["location"]).relative_to(output / "clips")).exists() for row in rows
    )
    mean = np.mean([figures["clap.tiny"] for figures in scored])
    assert mean == pytest.approx(report["models"][0]["figures"]["all"]["clap.tiny"]["value"], abs=1e-5)


def test_cached_clips_are_reused_and_missing_ones_generated_identically(
    evaluated: tuple[Path, dict[str, Any]],
    config: EvaluationConfig,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, report = evaluated
    cache = tmp_path / "cache"
    shutil.copytree(output / "clips", cache)
    clips = sorted(cache.glob("*/*.wav"))
    assert len(clips) == 24
    contents = {path: path.read_bytes() for path in clips}
    clips[0].unlink()
    clips[5].write_bytes(contents[clips[5]][:20])  # as after a full disk
    (clips[7].with_name(f".{clips[7].name}.part")).write_bytes(b"RIFF")
    made: list[object] = []
    submit = Engine.submit

    def counted(
        self: Engine,
        request: GenerationRequest,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
    ) -> Handle:
        made.append(request)
        return submit(self, request, on_event, deadline=deadline)

    monkeypatch.setattr(Engine, "submit", counted)
    sources = [models["first"], f"other={models['second']}"]
    again = evaluate(config, sources, tmp_path / "out", cache=cache)
    assert len(made) == 2
    assert {path: path.read_bytes() for path in clips} == contents
    assert again["models"] == report["models"]
    assert again["comparisons"] == report["comparisons"]
    # Other seeds are other clips; the old ones are kept.
    few = replace(config, first_seed=1, seeds=1, embedders=(), reward=None, judge=None, sheet=0)
    evaluate(few, sources[:1], tmp_path / "out", cache=cache)
    assert len(made) == 2
    evaluate(replace(few, first_seed=2), sources[:1], tmp_path / "out", cache=cache)
    assert len(made) == 8


def test_folders_of_clips_are_compared(config: EvaluationConfig, tmp_path: Path) -> None:
    old, new = (clip_folder(tmp_path / name, seed=seed, clips=2) for seed, name in enumerate(("old", "new")))
    references = tmp_path / "captions.csv"
    lines = [f"{prompt},{old / f'{number}-0.wav'}" for number, prompt in enumerate(PROMPTS)]
    references.write_text("\n".join(["caption,reference", *lines]) + "\n")
    report = evaluate(replace(config, prompts=references), [str(old), f"new={new}"], tmp_path / "out")
    assert [model["model"] for model in report["models"]] == [{"name": "elsewhere"}] * 2
    assert report["prompts"] | {"digest": ""} == {
        "count": 4,
        "clips": 8,
        "references": 4,
        "digest": "",
        "splits": {
            "all": 8,
            "temporal": 4,
            "non-temporal": 4,
            "multiple concepts": 4,
            "single concept": 4,
        },
    }
    lines = (tmp_path / "out" / "clips.jsonl").read_text().splitlines()
    kl = [row["figures"]["kl.tagger"] for row in map(json.loads, lines)]
    assert kl[0] == pytest.approx(0.0, abs=1e-4)  # the reference is the clip itself
    assert "presence" not in report["models"][0]["figures"]["all"]  # their events are unknown
    # No set metrics without references.
    alone = evaluate(config, [str(old)], tmp_path / "out")
    assert not [
        name for name in alone["models"][0]["figures"]["all"] if name.startswith(("fad", "kad", "kl"))
    ]
    assert alone["comparisons"] == []
    assert alone["prompts"]["references"] == 0


def test_folders_with_other_prompts_or_counts_are_refused_in_one_line(
    config: EvaluationConfig, tmp_path: Path
) -> None:
    whole = clip_folder(tmp_path / "whole")
    fewer = clip_folder(tmp_path / "fewer", prompts=PROMPTS[:2])
    twice = clip_folder(tmp_path / "twice", clips=2)
    for pair, message in (
        ((whole, fewer), "fewer lacks 2 of 4 prompts .'a bell rings"),
        ((fewer, whole), "whole also has 2 of 2 prompts"),
        ((whole, twice), "has 1 clips in whole, 2 in twice"),
    ):
        with pytest.raises(InvalidInputError, match=message) as caught:
            evaluate(config, [str(path) for path in pair], tmp_path / "out")
        assert "\n" not in str(caught.value)
    (whole / "index.jsonl").write_text("{}\n")
    with pytest.raises(InvalidInputError, match=r"index\.jsonl:1: has no prompt"):
        evaluate(config, [str(whole)], tmp_path / "out")


def test_other_seeds_give_a_warning(config: EvaluationConfig, models: dict[str, str], tmp_path: Path) -> None:
    first = clip_folder(tmp_path / "first", prompts=PROMPTS[:3])
    other = clip_folder(tmp_path / "other", prompts=PROMPTS[:3])
    lines = (other / "index.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"seed": 9} for line in lines]
    (other / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    light = replace(config, embedders=(), reward=None, judge=None)
    report = evaluate(light, [str(first), str(other), f"model={models['first']}"], tmp_path / "out")
    assert [warning for warning in report["warnings"] if "seeds" in warning] == [
        "other has clips of other seeds than first: they are paired by prompt alone"
    ]
    for row in rows:
        row.pop("seed")
    (other / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InvalidInputError, match="have no seeds, so model can't generate"):
        evaluate(light, [str(other), f"model={models['first']}"], tmp_path / "out")


def test_unreadable_clips_are_left_out_of_both_counted_and_listed(
    config: EvaluationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = tuple(f"{prompt} {word}" for prompt in PROMPTS for word in ("a", "b", "c", "d", "e", "f"))
    first, second = (clip_folder(tmp_path / name, prompts=many, seed=7) for name in ("first", "second"))
    cut = (second / "3-0.wav").read_bytes()
    (second / "3-0.wav").write_bytes(cut[: len(cut) // 2])
    loud, rate = soundfile.read(second / "5-0.wav", dtype="float32")
    soundfile.write(second / "5-0.wav", loud * (1.5 / np.abs(loud).max()), rate, subtype="FLOAT")
    soundfile.write(first / "5-0.wav", loud / np.abs(loud).max(), rate, subtype="FLOAT")
    light = replace(config, embedders=(), reward=None, judge=None, sheet=0)
    report = evaluate(light, [str(first), str(second)], tmp_path / "out")
    (warning,) = report["clip_warnings"]
    assert "5-0.wav: clip has samples up to 1.5, over full scale" in warning
    assert [len(model["unreadable"]) for model in report["models"]] == [0, 1]
    assert [model["figures"]["all"]["silent"]["count"] for model in report["models"]] == [23, 23]
    differences = report["comparisons"][0]["differences"]["all"].values()
    assert all(abs(difference["value"]) < 1e-6 for difference in differences)
    printed = capsys.readouterr().err
    assert "can't be read and are left out: 1" in printed
    assert "3-0.wav" in printed
    (second / "4-0.wav").unlink()
    with pytest.raises(InvalidInputError, match=r"second: 2 of 24 clips can't be read, at most 5%") as caught:
        evaluate(light, [str(first), str(second)], tmp_path / "out")
    assert "No such file" in str(caught.value)


def test_invalid_sources_are_refused(
    config: EvaluationConfig, models: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=r"two have the same name \(first, first\)"):
        evaluate(config, [models["first"], models["first"]], tmp_path)
    with pytest.raises(InvalidInputError, match="is missing"):
        evaluate(config, [], tmp_path)
    with pytest.raises(InvalidInputError, match="model: is 'nowhere'"):
        evaluate(config, ["nowhere"], tmp_path)
    with pytest.raises(ModelNotFoundError, match="is no folder"):
        evaluate(config, [f"file:{tmp_path / 'none'}"], tmp_path)


def test_plots_of_little_data(tmp_path: Path) -> None:
    nan = np.full(3, np.nan)
    assert distribution_plot({"silent": {"a": np.array([0.0, 1.0, 1.0])}, "kl": {"a": nan}}) is None
    values = {"reward": {"a": np.array([1.0, 2.0, 3.0, np.nan]), "b": np.array([1.0, 1.0, 1.0, 1.0])}}
    first = distribution_plot(values)
    assert first is not None
    assert first == distribution_plot(values)
    assert spectrogram_sheet(["rain"], {"a": [FileClip(path=tmp_path / "none.wav")]}) is None


def test_the_command_shows_tables(config: EvaluationConfig, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    old, new = (clip_folder(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    light = [
        f"scorers={config.scorers[0]}",
        "reward=none",
        "judge=none",
        "embedders=",
        "sheet=1",
        "device=cpu",
    ]
    flags = [flag for setting in light for flag in ("--set", setting)]
    arguments = [str(old), str(new), "-o", str(tmp_path / "out"), *flags]
    runner = CliRunner(env={"COLUMNS": "100"})
    shown = runner.invoke(app, [*arguments, "--show"])
    assert "embedders=\n" in shown.stdout
    assert not (tmp_path / "out").exists()
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert "clap.tiny" in result.stdout
    assert "new - old" in result.stdout
    assert (tmp_path / "out" / "report.md").exists()
    printed = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
    assert json.loads(printed)["comparisons"][0]["name"] == "new"
    wrong = runner.invoke(app, [*arguments, "--prompts", str(tmp_path / "none.csv")])
    assert isinstance(wrong.exception, InvalidInputError)
    assert os.linesep not in str(wrong.exception)
