"""A simulated listener drives the whole loop: ratings, a reward model of them, candidates, DPO, a version."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.listeners import Listener, collect, draw_prompts
from services.ratings.store import RatingStore
from services.weights.registry import LOCAL_STORE
from training.runs.run import run_loop
from training.runs.run_recipes import run_smoke


@pytest.fixture
def url(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database of ratings, in a folder with a registry and a cache of its own."""
    shutil.copy(empty_store, tmp_path / LOCAL_STORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    return f"sqlite:///{tmp_path}/ratings.db"


def test_from_ratings_to_a_registered_version(url: str, tmp_path: Path) -> None:
    found = collect(url, prompts=8, raters=2, noise=0.0, steps=4)
    assert found["prompts"] == 8
    # Without noise both raters hear the same, and hidden repeats are answered as before.
    assert {one["consistency"] for one in found["raters"].values()} == {1.0}
    if not found["decided"]:
        pytest.fail("the tagger prefers no clip; draw other prompts")

    config = replace(run_smoke(), preferences=replace(run_smoke().preferences, ratings=url))
    output = tmp_path / "run"
    done = run_loop(config, output)
    assert done.registered.name == "milonga-tango"
    reward = json.loads((output / "reward" / "evaluation.json").read_text())
    rated = sum(counts.get("strategy listeners", 0) for counts in reward["examples"].values())
    assert rated == found["decided"]
    for stage in ("sft", "dpo"):
        report = json.loads((output / "round-1" / stage / "training.json").read_text())
        assert "pairs.parquet" in report["data"]["files"]

    # A run that is resumed learns from the same ratings, whatever was rated since.
    store = RatingStore(url)
    rater = store.rater(store.add_rater("late"))
    store.rate(rater, 1, "right")
    store.close()
    assert run_loop(config, output).registered == done.registered


def test_noise_is_the_share_of_answers_that_are_the_opposite(url: str) -> None:
    collect(url, prompts=4, raters=1, noise=0.0, steps=4)
    store = RatingStore(url)
    one = store.ratings()[0]
    clips = store.clip(one.left), store.clip(one.right)
    store.close()
    prompts = draw_prompts(4)
    _, right = Listener(prompts, noise=0.0, seed=0).rate(one.prompt, *clips)
    _, wrong = Listener(prompts, noise=1.0, seed=0).rate(one.prompt, *clips)
    assert right.left_present is not wrong.left_present
    assert right.right_in_order is not wrong.right_in_order
