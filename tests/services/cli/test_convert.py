"""`milonga convert-captioner`: its order of paths, and its errors."""

from pathlib import Path

import pytest

from services.cli import run
from services.models.captioner.model import check_captioner
from tests.services.models.captioner.released import write_released


def test_convert_captioner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_released(tmp_path / "slam")
    eat, model, target = (str(tmp_path / name) for name in ("slam/eat.pt", "slam/model.pt", "out"))
    options = ["--language-model", str(source / "llm"), "--heads", "4"]
    assert run(["convert-captioner", eat, model, target, *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == target and "language model" in printed.err
    check_captioner(Path(target))

    assert run(["convert-captioner", eat, model, target, *options, "--quiet"]) == 4
    assert (
        capsys.readouterr().err.strip()
        == f"error: {target} exists already; remove it or choose another folder"
    )
    # Four paths: the third has the adapters, which this folder does not.
    assert run(["convert-captioner", eat, model, str(source / "llm"), f"{target}2", *options, "-q"]) == 2
    assert "adapter_config.json is missing" in capsys.readouterr().err
    assert run(["convert-captioner", eat, model, *options]) == 2
    assert "has 2 paths; give EAT, MODEL, maybe PEFT_FOLDER, and TARGET" in capsys.readouterr().err
    assert not Path(f"{target}2").exists()
