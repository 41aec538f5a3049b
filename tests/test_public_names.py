"""`from milonga import …`: the public names, and what importing them costs."""

import subprocess
import sys

import pytest

import milonga


@pytest.mark.parametrize("name", milonga.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(milonga, name).__name__ == name
    assert name in dir(milonga)


def test_other_names_are_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = milonga.Nothing  # type: ignore[attr-defined]


def test_the_client_comes_without_torch() -> None:
    program = (
        "import sys; from milonga import AudioClient, Clip, MilongaError; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
