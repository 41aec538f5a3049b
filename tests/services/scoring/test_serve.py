"""The service as a program, and what it refuses to start with."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.errors import (
    DigestMismatchError,
    InvalidInputError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
)
from services.runtime.serving import run
from services.runtime.settings import load_settings
from services.scoring.serve import SERVICE, load
from services.scoring.settings import ScoringSettings
from tests.programs import environment

COMMAND = [sys.executable, "-m", "services.scoring"]
WEIGHTS = "model.safetensors"


def _environment(scorers: str | None) -> dict[str, str]:
    given = {} if scorers is None else {"MILONGA_SCORERS": scorers}
    return environment(MILONGA_LISTEN="127.0.0.1:0", **given)


def _refusal(scorers: str | None) -> str:
    """Return the one line with which the program refuses to start, and check its exit code."""
    done = subprocess.run(
        COMMAND, env=_environment(scorers), capture_output=True, text=True, timeout=60, check=False
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith('{"')]
    assert done.returncode == 2, done.stderr
    (line,) = errors
    assert line.startswith("error: ")
    return line


def _settings(**settings: Any) -> ScoringSettings:
    return load_settings(ScoringSettings, **{"device": "cpu", "threads": 1, **settings})


def _broken(folder: Path, tmp_path: Path) -> Path:
    """A copy without a manifest, to be spoilt."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    (copy / "milonga.json").unlink()
    return copy


def _load_refusal(uri: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(_settings(scorers={"it": uri}))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("scorer it: ")
    return caught.value


def test_the_program_refuses_in_one_line_and_with_exit_code_2(folders: dict[str, Path]) -> None:
    assert "MILONGA_SCORERS" in _refusal(None)
    assert "JSON" in _refusal("a=mini:clap-a")
    pinned = f"file:{folders['b']}#sha256:{'0' * 64}"
    line = _refusal(json.dumps({"a": f"file:{folders['a']}", "b": pinned}))
    assert "scorer b: " in line
    assert "correct the pin" in line


@pytest.mark.parametrize(
    ("scorers", "said"),
    [
        ({}, "at least one: --scorer NAME=URI"),
        ({"a b": "mini"}, "'a b' must be 1 to 64 letters"),
        ({"": "mini"}, "'' must be"),
        ({"a" * 65: "mini"}, "must be 1 to 64"),
        ({"a\n": "mini"}, "must be 1 to 64"),
    ],
)
def test_names_are_checked(scorers: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        _settings(scorers=scorers)


def test_every_wrong_uri_is_named_before_anything_is_loaded() -> None:
    with pytest.raises(InvalidInputError) as caught:
        run(SERVICE, _settings(scorers={"a": "maxi", "b": "mini", "c": "mini:x"}))
    assert [violation.field for violation in caught.value.violations] == ["scorers.a", "scorers.c"]


def test_wrong_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    absent = _load_refusal(f"file:{tmp_path}/absent")
    assert isinstance(absent, ModelNotFoundError)
    pinned = _load_refusal(f"file:{folders['a']}#sha256:{'0' * 64}")
    assert isinstance(pinned, DigestMismatchError)


def test_a_file_changed_after_the_manifest_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "changed"
    shutil.copytree(folders["a"], copy)
    shutil.copy(folders["b"] / WEIGHTS, copy / WEIGHTS)
    assert isinstance(_load_refusal(f"file:{copy}"), DigestMismatchError)


def test_a_missing_tensor_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = _broken(folders["a"], tmp_path)
    tensors = load_file(copy / WEIGHTS)
    del tensors["audio_projection.linear1.weight"]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    error = _load_refusal(f"file:{copy}")
    assert isinstance(error, ModelFormatError)
    assert "audio_projection.linear1.weight" in str(error)


def test_a_pickle_payload_is_refused_unread(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = _broken(folders["a"], tmp_path)
    (copy / WEIGHTS).unlink()
    trap = tmp_path / "trap"
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(trap)))
    error = _load_refusal(f"file:{copy}")
    assert isinstance(error, ModelFormatError)
    assert "pickle" in str(error)
    assert not trap.exists()


def test_a_laion_checkpoint_with_a_payload_is_refused_unread(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = tmp_path / "630k-best.pt"
    torch.save({"state_dict": {"module.logit_scale_a": _Trap(trap)}}, path)
    assert isinstance(_load_refusal(f"laion:{path}"), ModelFormatError)
    path.write_bytes(b"no checkpoint")
    assert isinstance(_load_refusal(f"laion:{path}"), ModelFormatError)
    assert isinstance(_load_refusal(f"laion:{path}#sha256:{'0' * 64}"), DigestMismatchError)
    assert not trap.exists()


def test_another_kind_of_model_is_refused() -> None:
    assert isinstance(_load_refusal("mini:tagger"), ModelFormatError)


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
