"""The second study, from pairs to tables: `python -m benchmarks.study2 --recipe study-2-smoke`."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.study2.__main__ import Stage, Study, locked, main, run_stages, write_subset
from benchmarks.study2.config import BASE, METHODS, StudyRun, linked, trainings
from benchmarks.study2.judge import Judge, activity, check_judge, patches, spectrogram, train_judge
from benchmarks.study2.recipes import RECIPES, study_mini, study_smoke
from benchmarks.study2.results import comparisons
from benchmarks.study2.scoring import read_scores, study_plan
from benchmarks.study2.tables import growth_plot, study_of, tabulate, verdicts, written
from services.errors import InvalidInputError
from tests.training.finetuning.finetune_program import clip, write_pairs
from training.finetuning.baton import BatonTraining
from training.finetuning.dpo import DpoTraining
from training.loop.config import override
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import Event
from training.soundworld.synthesis import CLASSES


def test_the_smoke_study_ends_with_tables_that_its_result_alone_gives_again(tmp_path: Path) -> None:
    config = replace(study_smoke(), methods=("sft-dpo", "online"), growth_betas=())
    study = Study(config, tmp_path)
    run_stages(study.stages(), tmp_path / "locks")
    reports = {
        name: json.loads((tmp_path / "models" / name / "training.json").read_text())
        for name in ("sft-0", "sft-dpo-0", "online.1-0", "online-0", "pairs-2")
    }
    parents = {name: report["parent"]["name"] for name, report in reports.items()}
    assert parents["sft-dpo-0"] == "sft-0" and parents["online-0"] == "online.1-0"
    assert {parents[name] for name in ("sft-0", "online.1-0", "pairs-2")} == {"mini-base"}
    # Of sft-dpo the reference is the start, so that it has drifted before its first step.
    assert reports["sft-dpo-0"]["settings"]["reference"] == "mini-base"
    assert reports["pairs-2"]["data"]["examples"] == 2 and reports["sft-0"]["data"]["examples"] == 3
    assert len(list((tmp_path / "data" / "of-base").glob("candidates-*"))) == 1
    assert not list((tmp_path / "models").glob("*.run/checkpoints"))

    lines = tabulate(tmp_path / "result")
    assert any(line.startswith("sft-dpo: present_and_in_order") for line in lines)
    found = json.loads((tmp_path / "result" / "study.json").read_text())
    assert found["splits"].keys() == {"all", "short", "long", "held_out"}
    figures = found["splits"]["all"]["figures"]
    assert list(figures) == [BASE, "sft-dpo-0", "online-0", "pairs-2"]
    both = [read_scores(tmp_path / "figures" / kind / "base.npz").values for kind in ("short", "long")]
    for metric in ("present_and_in_order", "second.present_and_in_order", "silent"):
        mean = float(np.concatenate([values[metric] for values in both]).mean())
        assert figures[BASE][metric]["value"] == pytest.approx(mean)
    assert found["growth"]["pairs"][0]["value"] == 2.0
    assert "fad.tagger" in found["splits"]["short"]["differences"][0]["figures"]

    shutil.copytree(tmp_path / "result", tmp_path / "copy", ignore=shutil.ignore_patterns("study.*", "*.png"))
    assert tabulate(tmp_path / "copy")[:-1] == lines[:-1]
    for name in ("study.json", "study.md", "growth.png"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "result" / name).read_bytes()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    run_stages(study.stages(), tmp_path / "locks")
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_stages_run_once_in_an_order_that_their_needs_allow(tmp_path: Path) -> None:
    ran: list[str] = []

    def stage(name: str, *needs: str) -> Stage:
        def run() -> None:
            ran.append(name)
            (tmp_path / name).touch()

        return Stage(name=name, made=tmp_path / name, needs=tuple(tmp_path / n for n in needs), run=run)

    (tmp_path / "done").touch()
    run_stages([stage("c", "b"), stage("b", "a", "done"), stage("a"), stage("done")], tmp_path / "locks")
    assert ran == ["a", "b", "c"]
    with locked(tmp_path / "lock") as mine, locked(tmp_path / "lock") as theirs:
        assert mine and not theirs
    with locked(tmp_path / "lock") as free:
        assert free


def _by_name(config: StudyRun) -> dict[str, Any]:
    return {one.name: one for one in trainings(config)}


def test_methods_share_what_they_have_in_common() -> None:
    config = replace(study_mini(), seeds=(0, 2))
    found = _by_name(config)
    assert {f"{method}-{seed}" for method in METHODS for seed in (0, 2)} <= found.keys()
    assert (found["sft-dpo-2"].start, found["rounds-2"].start) == ("sft-2", "dpo-2")
    assert (found["rounds-2"].data.model, found["online-2"].data.model) == ("dpo-2", "online.2-2")
    assert found["online.1-0"].data == found["online.1-2"].data != found["sft-0"].data
    assert found["dpo-0"].data == found["baton-2"].data and found["dpo-0"].data.limit == config.pairs
    noise = {
        one.data.config.candidates.seed for name, one in found.items() if name.startswith(("rounds", "on"))
    }
    assert len(noise) == 1 + 2 + 4  # the shared ones; the second rounds; two later rounds of each online
    assert [one.config.loop.seed for one in (found["sft-2"], found["online.1-2"])] == [2, 2]
    assert not found["online.1-0"].scored and found["online-0"].scored
    betas = [found[f"beta-{beta:g}"].config.beta for beta in config.growth_betas]
    assert betas == list(config.growth_betas) and found["pairs-300"].data.limit == 300


def test_a_method_alone_brings_what_it_needs_and_scores_it_alone() -> None:
    config = replace(study_mini(), seeds=(1,), methods=("rounds",), growth_pairs=(), growth_betas=())
    assert {name: one.scored for name, one in _by_name(config).items()} == {"dpo-1": False, "rounds-1": True}
    stages = [stage.name for stage in Study(config, Path("x")).stages()]
    assert stages.index("training dpo-1") < stages.index("data rounds-1") < stages.index("training rounds-1")
    assert "figures of dpo-1, short" not in stages and stages[-1] == "distances"


def test_what_links_the_stages_is_filled_in(tmp_path: Path) -> None:
    found = _by_name(study_mini())
    uris = {BASE: "mini-base", "sft-0": "file:sft", "dpo-0": "file:dpo"}
    for name in ("sft-0", "sft-dpo-0", "rounds-0", "baton-0"):
        config: Any = linked(found[name], uris, tmp_path / "pairs", tmp_path / "latents")
        assert config.data.pairs == (tmp_path / "pairs",) and config.latents.cache == tmp_path / "latents"
        assert config.start == uris[found[name].start]
        if isinstance(config, DpoTraining):
            assert config.reference == ("mini-base" if name == "sft-dpo-0" else None)
        assert isinstance(config, BatonTraining) == (name == "baton-0")


def test_subsets_are_of_one_order_and_never_smaller_than_they_say(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "all.parquet", [(clip(i), clip(100 + i)) for i in range(9)])
    parts = []
    for limit in (3, 6):
        write_subset(source, tmp_path / f"{limit}.parquet", limit)
        parts.append(
            {row["bytes"] for row in pq.read_table(tmp_path / f"{limit}.parquet")["chosen"].to_pylist()}
        )
    assert (len(parts[0]), len(parts[1])) == (3, 6) and parts[0] < parts[1]
    with pytest.raises(InvalidInputError, match=r"pairs: 10 are wanted and .* has 9"):
        write_subset(source, tmp_path / "10.parquet", 10)


def test_the_prompts_have_two_or_three_events_and_are_of_their_split() -> None:
    prompts = replace(study_mini().prompts, short=40, long=10)
    short, long = (study_plan(prompts, kind, 2) for kind in ("short", "long"))
    assert (len(short), len(long)) == (80, 20)
    assert {len(one.prompt.truth.classes) for one in short if one.prompt.truth} == {2}
    assert {len(one.prompt.truth.classes) for one in long if one.prompt.truth} == {3}
    templates = study_plan(prompts, "held_out", 1)
    assert len(templates) == prompts.held_out
    assert not {one.prompt.text for one in templates} & {one.prompt.text for one in short}
    other = study_plan(replace(prompts, split="validation"), "short", 1)
    assert not {one.prompt.text for one in other} & {one.prompt.text for one in short}
    assert study_mini().prompts.split == "test"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seeds=", "seeds is empty"),
        ("seeds=1,1", "seeds is 1,1"),
        ("methods=ppo", "methods: is 'ppo'"),
        ("growth_betas=-5", "growth_betas is -5.0, must be above 0"),
        ("prompts.short=0", "short is 0"),
    ],
)
def test_studies_that_can_not_be_are_refused(setting: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        override(study_smoke(), [setting])


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_shows_settings_and_stages(name: str) -> None:
    app = typer.Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, ["--recipe", name, "--set", "methods=sft", "--show"])
    assert "methods=sft\n" in shown.stdout and "figures of sft-0, short\n" in shown.stdout
    wrong = CliRunner().invoke(app, ["--recipe", name, "--set", "method=sft"])
    assert wrong.exit_code == 2 and "known: methods" in wrong.stderr


def test_the_second_judge_learns_the_world_and_reads_truths() -> None:
    judge = train_judge(150)
    checked = check_judge(judge, 40)
    assert checked["second.presence"] > 0.6 and checked["second.order_given_presence"] > 0.9


def _judge(active: dict[str, Sequence[int]]) -> Any:
    """A judge that detects each class in some of 32 patches, whatever it is given."""

    class Fixed(Judge):
        def detect(self, waveform_N: Any) -> dict[str, Any]:
            return {name: np.isin(np.arange(32), list(patches)) for name, patches in active.items()}

    return Fixed((), (), np.zeros(1, np.float32), np.ones(1, np.float32))


def test_the_second_judges_figures_by_hand() -> None:
    then, both = (
        CaptionTruth(classes=("dog", "cat"), relation="then"),
        CaptionTruth(classes=("dog", "cat"), relation="while"),
    )
    clip_N = np.zeros(16, np.float32)
    apart = _judge({"dog": range(4, 9), "cat": range(12, 20)})
    assert apart.figures(then, clip_N) | {"second.simultaneous_given_presence": 0} == {
        "second.presence": 1.0,
        "second.order_given_presence": 1.0,
        "second.present_and_in_order": 1.0,
        "second.simultaneous_given_presence": 0,
    }
    reversed_ = CaptionTruth(classes=("cat", "dog"), relation="then")
    assert apart.figures(reversed_, clip_N)["second.present_and_in_order"] == 0.0
    assert apart.figures(both, clip_N)["second.simultaneous_given_presence"] == 0.0
    half = _judge({"dog": range(4, 10), "cat": range(7, 20)})
    assert half.figures(both, clip_N)["second.simultaneous_given_presence"] == 1.0  # 3 of 6
    missing = _judge({"dog": range(4, 9)}).figures(then, clip_N)
    assert missing["second.presence"] == 0.0 and np.isnan(missing["second.order_given_presence"])


def test_patches_and_their_truth_have_one_number() -> None:
    for samples in (40_960, 81_920):
        bands_FM = spectrogram(np.zeros(samples, np.float32))
        event = Event(event_class="dog", onset=0.5, offset=1.0, level=-20)
        truth_PK = activity([event], len(bands_FM))
        assert len(patches(bands_FM)) == len(truth_PK)
        assert truth_PK[:, CLASSES.index("dog")].sum() == pytest.approx(0.5 / 0.08, abs=1)


def _columns(rates: dict[str, float], clips: int = 40) -> dict[str, list[float]]:
    """Figures of clips of which the given share has a 1."""
    return {name: [float(i < rate * clips) for i in range(clips)] for name, rate in rates.items()}


def made_up_result() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of two methods and two seeds, and one model of each growth curve."""
    rates = {
        "base": 0.5,
        "sft-0": 0.525,
        "sft-1": 0.775,
        "dpo-0": 0.95,
        "dpo-1": 1.0,
        "pairs-100": 0.6,
        "beta-60": 0.4,
    }
    figures = {
        name: _columns({"present_and_in_order": rate, "second.present_and_in_order": rate})
        for name, rate in rates.items()
    }
    distances = {"base": 1.0, "sft-0": 1.5, "sft-1": 1.7, "dpo-0": 1.0, "dpo-1": 1.1}
    interval = {"low": None, "high": None, "count": 40}
    fad = {name: {"fad.tagger": {"value": distances.get(name, 1.2)} | interval} for name in rates}
    differences = [
        {"name": name, "against": against, "figures": {"fad.tagger": {"value": 0.1} | interval}}
        for name, against in comparisons(list(rates))
    ]
    clips = {"kinds": {"short": {"prompts": [f"p{i}" for i in range(40)], "figures": figures}}}
    trained = {
        "name": "made-up",
        "start": {"name": "mini-base"},
        "trainings": {name: {"figures": {"chosen_drift": 0.01}} for name in rates if name != "base"},
    }
    return clips, {"short": {"figures": fad, "differences": differences}}, trained


def test_the_tables_say_who_beats_whom_and_who_keeps_the_sound() -> None:
    study = study_of(*made_up_result())
    assert verdicts(study) == [
        "sft: present_and_in_order 0.650, not above base in all trainings; "
        "loses the sound (fad.tagger × 1.60)",
        "dpo: present_and_in_order 0.975, above base, above sft in all trainings; "
        "keeps the sound (fad.tagger × 1.05)",
    ]
    split = study["splits"]["all"]
    assert split["means"]["dpo"]["present_and_in_order"] == pytest.approx(
        {"value": 0.975, "low": 0.95, "high": 1.0}
    )
    pooled = {(one["name"], one["against"]): one["figures"] for one in split["pooled"]}
    assert pooled["dpo", "sft"]["present_and_in_order"]["value"] == pytest.approx(0.325)
    assert study["judges"] == {"clips": 280, "same": 1.0, "kappa": 1.0}
    assert [row["value"] for row in study["growth"]["beta"]] == [60.0]
    text = written(study)
    assert "| dpo-0 - sft-0 |" in text and "## Gain with pairs" in text
    json.dumps(study, allow_nan=False)


def test_tables_of_a_study_with_one_judge() -> None:
    clips, sets, trained = made_up_result()
    for figures in clips["kinds"]["short"]["figures"].values():
        del figures["second.present_and_in_order"]
    for one in (*sets["short"]["figures"].values(), *(d["figures"] for d in sets["short"]["differences"])):
        one["fad.yamnet"] = one.pop("fad.tagger")
    study = study_of(clips, sets, trained)
    assert study["judges"] is None
    assert verdicts(study)[1].endswith("keeps the sound (fad.yamnet × 1.05)")
    text = written(study)
    assert (
        "fad.yamnet" in text and "second." not in text.partition("## Gain")[0] and "judges agree" not in text
    )
    assert growth_plot(study).startswith(b"\x89PNG")
