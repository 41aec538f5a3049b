"""Progress bars where no terminal is."""

import sys

import pytest

from training.loop import progress as module
from training.loop.progress import progress


def test_a_log_gets_whole_lines_not_too_often(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, least, most in ((3600.0, 2, 2), (0.0, 6, 8)):
        monkeypatch.setattr(module, "LINE_SECONDS", seconds)
        with progress(total=5, desc="steps", unit="step") as bar:
            for number in range(5):
                bar.set_postfix(loss=number, refresh=False)
                bar.update()
        lines = capsys.readouterr().err.splitlines()
        assert least <= len(lines) <= most
        assert lines[0].startswith("steps:   0%")
        assert "5/5" in lines[-1] and "loss=4" in lines[-1]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress([1, 2], total=2, desc="steps", unit="step")) == [1, 2]
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_to_do_and_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        progress(total=0, desc="steps", unit="step"),
        progress(total=3, desc="s", unit="s", disable=True) as bar,
    ):
        bar.update(3)
    assert capsys.readouterr().err == ""
