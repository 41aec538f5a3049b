"""`milonga generate --check`, with the embedded generator and the embedded captioner."""

import json
from pathlib import Path

import numpy as np
import pytest

from services import cli
from services.api.generation import Clip
from services.cli.check import CheckOptions
from services.models.manifest import write_manifest
from tests.tiny import tiny_captioner

QUICK = ("--seed", "3", "--steps", "10", "--quiet")


def check(output: Path, prompt: str, *options: str) -> int:
    return cli.run(["generate", prompt, "-o", str(output), *QUICK, "--check", *options])


def test_it_says_in_words_what_the_captioner_hears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path / "clip.wav", "A dog barks then a siren wails") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / "clip.wav")]
    (line,) = [line for line in err.splitlines() if line.startswith("clip.wav caption: ")]
    assert line.rpartition("; ")[2]


def test_json_has_the_differences_of_each_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path / "clip.wav", "A bell rings", "--clips", "2", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["checks"]) == len(record["clips"]) == 2
    for one in record["checks"]:
        assert set(one) == {"caption", "missing", "added", "in_order"}
        assert one["in_order"] is None  # one event has no order
        assert set(one["missing"]) <= {"bell"}


def test_a_clip_without_sound_has_none_of_its_events() -> None:
    checker = CheckOptions(check=True).open("cpu")
    assert checker is not None
    silence = Clip.of_samples(np.zeros(16_000, np.float32), 16_000)
    (found,) = checker.check("a dog barks then a siren wails", [silence])
    assert found.line() == "caption: none, there is no sound in the clip; missing: dog, siren"
    assert found.record() == {"caption": "", "missing": ["dog", "siren"], "added": [], "in_order": None}
    checker.close()


def test_what_can_not_be_compared_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path / "clip.wav", "A bell rings softly") == 0
    assert "(not compared: the captioner has no words for 'softly')" in capsys.readouterr().err
    folder = tmp_path / "captioner"
    tiny_captioner().save_pretrained(folder)
    write_manifest(folder, name="tiny", version="1", license="Apache-2.0")
    assert check(tmp_path / "clip.wav", "A bell rings", "--captioner", f"file:{folder}") == 0
    assert "(not compared: this captioner has no events.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A bell rings", "--captioner", "mini:captioner"], "--captioner: describes clips for --check"),
        (["--prompts", "list.csv", "-o", "out", "--check"], "--check: is for one PROMPT"),
        (["A bell rings", "--check", "--captioner", "mini:nothing"], "mini:nothing"),
        (["A bell rings", "--check", "--captioner", "nothing"], "--captioner: is 'nothing', must be mini"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("prompt\nA bell rings\n")
    assert cli.run(["generate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.wav"))
