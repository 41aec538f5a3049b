import io
from dataclasses import replace
from pathlib import Path

import datasets  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import soundfile
from rich.console import Console
from typer.testing import CliRunner

from services.errors import InvalidInputError
from tests.training.preferences.conftest import Models, Stages
from tests.training.preferences.test_scores import _copied
from training.commands.preferences import read_shard
from training.data import examples
from training.data.store import Row
from training.preferences.candidates import read_candidates
from training.preferences.dataset import (
    DatasetConfig,
    dataset_digest,
    print_table,
    read_preferences,
    write_dataset,
)
from training.preferences.pairs import read_pairs
from training.preferences.perturb import PerturbConfig
from training.preferences.pipeline import PREFERENCES, PreferencesConfig, Stage, make_preferences


@pytest.fixture(scope="module")
def written(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    write_dataset(DatasetConfig(rows_per_file=5), stages.candidates, stages.scores, stages.pairs, folder)
    return folder


def _public(path: Path, count: int = 6) -> Path:
    """A file with the four columns of the public data."""
    rng = np.random.default_rng(0)

    def audio(index: int) -> dict[str, bytes | str]:
        buffer = io.BytesIO()
        soundfile.write(buffer, rng.normal(0, 0.1, 4_000).astype(np.float32), 16_000, format="WAV")
        return {"bytes": buffer.getvalue(), "path": f"{index}.wav"}

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "prompt": [f"Sound {i}" for i in range(count)],
        "chosen": [audio(i) for i in range(count)],
        "rejected": [audio(-1 - i) for i in range(count)],
        "strategy": [i % 3 + 1 for i in range(count)],
    }
    pq.write_table(pa.table(table), path, row_group_size=4)
    return path


def test_columns_and_clips(stages: Stages, written: Path) -> None:
    pairs, found = read_pairs(stages.pairs), read_preferences(written)
    clips = {row["id"]: row for row in read_candidates(stages.candidates)}
    assert len(sorted((written / "data").glob("train-*-of-*.parquet"))) == -(-len(pairs) // 5)
    assert len(found) == len(pairs)
    for pair, preference in zip(pairs, found, strict=True):
        assert (preference.prompt, preference.strategy) == (pair["prompt"], pair["strategy"])
        assert preference.details["chosen_scores"] == pair["chosen_scores"]
        assert preference.details["rejected_prompt"] == clips[pair["rejected"]]["prompt"]
        assert preference.details["chosen_seed"] == clips[pair["chosen"]]["seed"]
        assert preference.details["rejected_steps"] == clips[pair["rejected"]]["num_inference_steps"]
        assert preference.details["model_digest"] == clips[pair["chosen"]]["model"]["digest"]
        assert set(preference.details["judge_digests"]) == {"clap-a", "clap-b", "reward"}
        waveform, rate = preference.rejected.read()
        wanted, _ = soundfile.read(stages.candidates / clips[pair["rejected"]]["file"], dtype="float32")
        assert rate == 16_000
        assert np.array_equal(waveform[0], wanted)


def test_hugging_faces_datasets_reads_it(stages: Stages, written: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(written), cache_dir=str(tmp_path), split="train")
    assert loaded.features["chosen"] == datasets.Audio(sampling_rate=16_000)
    assert loaded.column_names[:4] == ["prompt", "chosen", "rejected", "strategy"]
    assert loaded.features["chosen_scores"]["clap-a"] == datasets.Value("float64")
    # Decoding needs torchcodec there, which nothing here does.
    raw = loaded
    for side in ("chosen", "rejected"):
        raw = raw.cast_column(side, datasets.Audio(decode=False))
    content = raw[0]["chosen"]["bytes"]
    assert soundfile.info(io.BytesIO(content)).samplerate == 16_000
    assert len(loaded) == len(read_pairs(stages.pairs))


def test_the_training_programs_read_it(written: Path) -> None:
    found = [pair for path in sorted((written / "data").iterdir()) for pair in examples.read_pairs(path)]
    assert [pair.prompt for pair in found] == [one.prompt for one in read_preferences(written)]
    assert all(pair.kind.startswith("strategy ") for pair in found)


def test_the_digest_is_of_the_content(stages: Stages, written: Path, tmp_path: Path) -> None:
    report = write_dataset(DatasetConfig(), stages.candidates, stages.scores, stages.pairs, tmp_path / "one")
    assert len(list((tmp_path / "one" / "data").iterdir())) == 1
    found = read_preferences(written)
    assert report["digest"] == dataset_digest(found)
    assert report["digest"].startswith("sha256:")
    assert dataset_digest(found[1:]) != report["digest"]
    again = write_dataset(DatasetConfig(), stages.candidates, stages.scores, stages.pairs, tmp_path / "two")
    assert again == report
    files = [next((tmp_path / name / "data").iterdir()).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_the_public_data_is_read(tmp_path: Path) -> None:
    _public(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    found = read_preferences(tmp_path / "set")
    assert [one.strategy for one in found[:3]] == ["1", "2", "3"]
    assert found[0].details == {}
    assert all(one.chosen.read()[0].shape == (1, 4_000) for one in found)
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache")
    )
    assert loaded["train"].num_rows == 6


def test_what_is_no_preference_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no Parquet file"):
        read_preferences(tmp_path)
    pq.write_table(pa.table({"prompt": ["a"], "winner": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInputError, match="has no column chosen, rejected; it has prompt, winner"):
        read_preferences(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(InvalidInputError, match="can't be read"):
        read_preferences(tmp_path / "x.parquet")


def test_unreadable_clips_are_left_out_until_they_are_too_many(stages: Stages, tmp_path: Path) -> None:
    folder = _copied(stages.candidates, tmp_path / "candidates")
    clips, pairs = {row["id"]: row for row in read_candidates(folder)}, read_pairs(stages.pairs)
    lost = pairs[0]["chosen"]
    (folder / clips[lost]["file"]).unlink()
    with pytest.raises(InvalidInputError, match="No such file"):
        write_dataset(DatasetConfig(), folder, stages.scores, stages.pairs, tmp_path / "x")
    config = DatasetConfig(max_unreadable=0.9)
    report = write_dataset(config, folder, stages.scores, stages.pairs, tmp_path / "y")
    left = sum(lost in (row["chosen"], row["rejected"]) for row in pairs)
    assert report["left_out"] == left > 0
    assert report["pairs"] == len(pairs) - left == len(read_preferences(tmp_path / "y"))
    assert len(report["unreadable"]) == 1


def test_the_table_is_printed() -> None:
    figures = {"chosen": 0.645, "rejected": 0.447, "delta": 0.198}
    table: dict[str, Row] = {"1.1": {"samples": 3004, "a": figures}, "all": {"samples": 3004, "a": figures}}
    console = Console(file=io.StringIO(), width=100)
    print_table(table, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.1 other steps" in text
    assert all(word in text for word in ("3004", "0.645", "0.447", "0.198"))


def test_all_stages_and_again_nothing(
    stages: Stages, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PreferencesConfig(
        name="tiny",
        captions=stages.captions_config,
        perturb=PerturbConfig(concept=1, temporal=1),
        candidates=stages.candidates_config,
        scores=stages.scores_config,
        pairs=replace(stages.pairs_config, rank_by="mean"),
    )
    told: list[Stage] = []
    folders = make_preferences(config, tmp_path, shard=(0, 2), on_stage=lambda stage, *_: told.append(stage))
    assert told == ["captions", "perturb", "candidates"]
    folders = make_preferences(config, tmp_path, on_stage=lambda stage, *_: told.append(stage))
    assert list(folders) == ["captions", "perturb", "candidates", "scores", "pairs", "dataset"]
    assert read_preferences(folders["dataset"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_preferences(config, tmp_path) == folders
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    # What comes before a changed setting stays.
    ranked = replace(config, pairs=replace(config.pairs, mode="ranked"))
    other = make_preferences(ranked, tmp_path)
    assert [name for name in folders if folders[name] != other[name]] == ["pairs", "dataset"]
    free = replace(config, scores=replace(config.scores, batch=3))
    assert make_preferences(free, tmp_path, until="scores")["scores"] == folders["scores"]


def test_the_command() -> None:
    import typer

    from training.commands.preferences import preferences

    app = typer.Typer()
    app.command()(preferences)
    for recipe in PREFERENCES:
        shown = CliRunner().invoke(app, ["--recipe", recipe, "--show", "--set", "captions.clusters=7"])
        assert shown.exit_code == 0
        assert "captions.clusters=7" in shown.output
    assert read_shard("2/4") == (2, 4)
    for wrong in ("4/4", "1", "-1/2", "a/b"):
        with pytest.raises(InvalidInputError, match="must be I/N"):
            read_shard(wrong)
