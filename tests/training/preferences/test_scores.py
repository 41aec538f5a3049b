from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from services.api.scoring import Scores
from services.errors import InvalidInputError
from services.local import LocalScorers
from services.models.clap.loading import load_clap
from tests.services.scoring.serving import serving
from tests.training.preferences.conftest import Models, Stages
from training.data.store import read_json, read_rows
from training.preferences import scores as stage
from training.preferences.candidates import make_candidates, read_candidates
from training.preferences.captions import select_captions
from training.preferences.scores import ScoresConfig, read_scores, score_candidates


def _copied(folder: Path, target: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target


def test_clips_are_judged_against_the_caption(stages: Stages, models: Models) -> None:
    rows, scores = read_candidates(stages.candidates), read_scores(stages.scores)
    assert list(scores) == [row["id"] for row in rows]
    row = next(row for row in rows if row["kind"] is not None)
    assert row["prompt"] != row["caption"]
    clip, rate = soundfile.read(stages.candidates / row["file"], dtype="float32")
    for name, uri in (("clap-a", models.clap_a), ("clap-b", models.clap_b)):
        clap = load_clap(Path(uri.removeprefix("file:")))
        wanted = float(clap.score([row["caption"]], [clip], rate)[0])
        assert scores[row["id"]]["scores"][name] == pytest.approx(wanted, abs=1e-5)
    assert all(np.isfinite(score["reward"]) for score in scores.values())
    report = read_json(stages.scores / "report.json")
    assert set(report["judges"]) == {"clap-a", "clap-b", "reward"}
    assert [scorer["name"] for scorer in report["scorers"]] == ["clap-a", "clap-b"]


def test_prompts_that_models_do_not_read_are_counted_in_every_stage(
    stages: Stages, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "captions.csv"
    source.write_text("caption\na dog barks\nLe siren aboie\n")
    captions = replace(stages.captions_config, source=source, clusters=1, per_cluster=2)
    select_captions(captions, tmp_path / "captions")
    capsys.readouterr()
    config = replace(stages.candidates_config, strategies=("1.2",))
    made = make_candidates(config, tmp_path / "captions", None, tmp_path / "candidates")
    scored = score_candidates(stages.scores_config, tmp_path / "candidates", tmp_path / "scores")
    whole = read_json(tmp_path / "candidates" / "report.json")
    for report, reader in ((made, "tiny-tango"), (whole, "tiny-tango"), (scored, "clap-a, clap-b, reward")):
        found = report["prompt_warnings"]
        assert (found["by"], found["prompts"], found["with_warnings"]) == (reader, 2, 1)
        (example,) = found["examples"]
        assert example["prompt"] == "Le siren aboie"
        assert example["warnings"] == [
            "prompt has words that the model does not know: Le, aboie; use other words"
        ]
    assert capsys.readouterr().err.count("not read in full") == 2


def test_captions_without_a_known_word_are_left_out_and_too_many_refused(
    stages: Stages, tmp_path: Path
) -> None:
    source = tmp_path / "captions.csv"
    source.write_text("caption\na dog barks\nLe chien aboie\n")
    captions = replace(stages.captions_config, source=source, clusters=1, per_cluster=2)
    select_captions(captions, tmp_path / "captions")
    config = replace(stages.candidates_config, strategies=("1.2",))
    make_candidates(config, tmp_path / "captions", None, tmp_path / "candidates")
    with pytest.raises(
        InvalidInputError, match="know no word for a sound in 2 captions, as 'Le chien aboie'"
    ):
        score_candidates(stages.scores_config, tmp_path / "candidates", tmp_path / "scores")
    half = replace(stages.scores_config, max_unreadable=0.5)
    report = score_candidates(half, tmp_path / "candidates", tmp_path / "half")
    assert (report["clips"], report["scored"], report["unread_captions"]) == (4, 2, ["Le chien aboie"])
    assert len(read_scores(tmp_path / "half")) == 2


def test_a_service_gives_the_same(stages: Stages, models: Models, tmp_path: Path) -> None:
    with serving({"clap-a": models.clap_a, "clap-b": models.clap_b}) as served:
        config = ScoresConfig(scorers=("clap-b", "clap-a"), server=served.hosted.target, batch=8)
        score_candidates(config, stages.candidates, tmp_path / "served")
        with pytest.raises(InvalidInputError, match=r"clap-c: .* serves clap-a, clap-b"):
            score_candidates(replace(config, scorers=("clap-c",)), stages.candidates, tmp_path / "x")
    served_rows, own = read_scores(tmp_path / "served"), read_scores(stages.scores)
    assert list(served_rows) == list(own)
    for name, row in served_rows.items():
        assert row["scores"] == pytest.approx(own[name]["scores"], abs=1e-4)
        assert row["reward"] is None


def test_a_stage_that_was_stopped_goes_on(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = LocalScorers.score_audio, 0

    def score_audio(self: LocalScorers, *arguments: Any, **options: Any) -> Scores:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(LocalScorers, "score_audio", score_audio)
    with pytest.raises(KeyboardInterrupt):
        score_candidates(stages.scores_config, stages.candidates, tmp_path)
    assert len(read_rows(tmp_path / "scores.jsonl")) == 16
    score_candidates(stages.scores_config, stages.candidates, tmp_path)
    count = len(read_candidates(stages.candidates))
    assert calls == 3 + -(-(count - 16) // 8)
    again, whole = read_scores(tmp_path), read_scores(stages.scores)
    assert list(again) == list(whole)
    assert all(again[name]["scores"] == pytest.approx(whole[name]["scores"], abs=1e-5) for name in whole)


def test_unreadable_clips_are_left_out_and_listed_until_they_are_too_many(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copied(stages.candidates, tmp_path / "candidates")
    rows = read_candidates(folder)
    (folder / rows[3]["file"]).write_bytes(b"no sound")
    config = replace(stages.scores_config, max_unreadable=1.5 / len(rows))
    report = score_candidates(config, folder, tmp_path / "scores")
    assert report["scored"] == len(rows) - 1 == len(read_scores(tmp_path / "scores"))
    assert [Path(name).name for name in report["unreadable"]] == [Path(rows[3]["file"]).name]
    assert "1 of" in capsys.readouterr().err
    (folder / rows[5]["file"]).unlink()
    with pytest.raises(InvalidInputError, match=r"2 of \d+ clips can't be read.*No such file"):
        score_candidates(config, folder, tmp_path / "again")


def test_scorers_are_called_after_their_models_or_as_one_likes(models: Models) -> None:
    both = ScoresConfig(scorers=(models.clap_a, f"other={models.clap_a}"))
    assert list(stage.resolve_scorers(both)) == ["clap-a", "other"]
    with pytest.raises(InvalidInputError, match="give it a name: NAME=file:"):
        stage.resolve_scorers(ScoresConfig(scorers=(models.clap_a, f"clap-a={models.clap_b}")))
    for wrong in ({"scorers": ()}, {"scorers": ("a", "a")}, {"batch": 0}):
        with pytest.raises(ValueError):
            ScoresConfig(**wrong)
