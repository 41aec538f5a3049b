"""People's ratings as training data: a database and its exports, for every training."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services import cli
from services.errors import InvalidInputError, ServiceUnavailableError
from services.ratings.export import export_labels, export_pairs
from services.ratings.store import Answers, RatingStore
from tests.services.ratings.studies import PROMPTS, planned_store, rate_all
from training.data.examples import read_labelled, read_pairs
from training.runs.ratings import rated_files, with_ratings
from training.runs.recipes import baton_smoke, dpo_smoke, reward_smoke, sft_smoke
from training.runs.run import run_loop
from training.runs.run_recipes import run_smoke


@pytest.fixture
def rated(tmp_path: Path) -> Iterator[tuple[RatingStore, str]]:
    """A database in which Ann prefers b everywhere, and says of the first pair which clip is right."""
    url = f"sqlite:///{tmp_path}/ratings.db"
    store = planned_store(url)
    rater = rate_all(store, "ann")
    answers = Answers(left_present=True, left_in_order=True, right_present=False, right_in_order=False)
    store.rate(rater, 1, "left", answers)
    yield store, url
    store.close()


def test_every_training_takes_a_database(rated: tuple[RatingStore, str], tmp_path: Path) -> None:
    _, url = rated
    folder = tmp_path / "exports"
    for data in (with_ratings(sft_smoke(), url, folder).data, with_ratings(dpo_smoke(), url, folder).data):
        (path,) = data.pairs
        assert len(read_pairs(path)) == 10
    reward = with_ratings(reward_smoke(), url, folder).data
    assert (reward.pairs, reward.labelled) == ((folder / "pairs.parquet",), (folder / "labels.json",))
    baton = with_ratings(baton_smoke(), url, folder).data
    assert {one.label for one in read_labelled(baton.labelled[0])} == {0, 1}
    labels_only = with_ratings(replace(reward_smoke(), objective="bce"), url, folder).data
    assert not labels_only.pairs


def test_a_database_is_read_once(rated: tuple[RatingStore, str], tmp_path: Path) -> None:
    store, url = rated
    folder = tmp_path / "exports"
    (path,) = rated_files(url, folder)
    before = path.read_bytes()
    for name in ("eve", "bob"):
        rate_all(store, name, prefers_b=False)
    assert rated_files(url, folder)[0].read_bytes() == before
    with_ratings(dpo_smoke(), url, folder, fresh=True)
    assert path.read_bytes() != before


def test_exports_are_data_of_their_kind(rated: tuple[RatingStore, str], tmp_path: Path) -> None:
    store, _ = rated
    pairs, labels = tmp_path / "pairs.parquet", tmp_path / "labels.json"
    export_pairs(store, store.ratings(), pairs)
    export_labels(store, store.ratings(), labels)
    unused = tmp_path / "unused"
    assert with_ratings(dpo_smoke(), str(pairs), unused).data.pairs == (pairs,)
    assert with_ratings(dpo_smoke(), str(labels), unused).data.pairs == (labels,)
    assert with_ratings(reward_smoke(), str(labels), unused).data.labelled == (labels,)
    (pair,) = read_pairs(labels)
    assert pair.prompt == PROMPTS[0]
    assert not unused.exists()


def test_labels_without_both_kinds_of_clips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps([{"location": "a.wav", "captions": "rain", "label": 1}]))
    with pytest.raises(InvalidInputError, match="a liked and a disliked clip of no prompt"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("ratings", "says"),
    [
        ("postgresql://ann:secret@host/ratings", "has a password"),
        ("ratings.csv", "must be a database"),
        ("absent.parquet", "is no file"),
        ("oracle://host/x", "must be sqlite:///FILE"),
    ],
)
def test_wrong_ratings_are_named(tmp_path: Path, ratings: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says) as caught:
        with_ratings(dpo_smoke(), ratings, tmp_path / "exports")
    assert caught.value.violations[0].field == "preferences.ratings"
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "exports").exists()


def test_a_database_without_decided_pairs_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ratings.db"
    planned_store(url).close()
    with pytest.raises(InvalidInputError, match="no pair that a majority has decided; have more rated"):
        with_ratings(dpo_smoke(), url, tmp_path / "exports")
    (tmp_path / "broken.db").write_bytes(b"no database" * 100)
    with pytest.raises(ServiceUnavailableError, match="is not a database"):
        with_ratings(dpo_smoke(), f"sqlite:///{tmp_path}/broken.db", tmp_path / "others")
    with pytest.raises(InvalidInputError, match="which is no file"):
        with_ratings(dpo_smoke(), f"sqlite:///{tmp_path}/typo.db", tmp_path / "others")
    assert not (tmp_path / "typo.db").exists()


def test_commands_train_on_a_database(
    rated: tuple[RatingStore, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = rated
    words = ["train", "dpo", "--recipe", "smoke", "--set", f"preferences.ratings={url}"]
    assert cli.run([*words, "--output", str(tmp_path / "dpo")]) == 0
    report = json.loads((tmp_path / "dpo" / "training.json").read_text())
    assert report["data"]["examples"] == 10
    capsys.readouterr()
    assert cli.run(["train", "preferences", "--recipe", "smoke", "--set", f"ratings={url}"]) == 2
    assert "is for milonga train run" in capsys.readouterr().err


def test_a_wrong_setting_binds_no_folder_of_a_run(tmp_path: Path) -> None:
    preferences = replace(run_smoke().preferences, ratings="absent.parquet")
    with pytest.raises(InvalidInputError, match="is no file"):
        run_loop(replace(run_smoke(), preferences=preferences), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_take_files_only(
    rated: tuple[RatingStore, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["train", "reward", "--recipe", "smoke", "--set", f"preferences.ratings={rated[1]}"]) == 2
    assert "milonga ratings export" in capsys.readouterr().err
