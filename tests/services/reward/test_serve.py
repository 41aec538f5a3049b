"""The service as a program: what it loads, and what it refuses in one clear line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.errors import DigestMismatchError, InvalidInputError, ModelError, ModelFormatError
from services.models.manifest import write_manifest
from services.models.reward.model import WEIGHTS_NAME
from services.reward.serve import load
from services.reward.settings import RewardSettings, model_uris
from services.runtime.settings import load_settings
from tests.programs import environment
from tests.services.reward.serving import write_models
from tests.tiny import tiny_clap


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny CLAP model and of a reward model that stands on it."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def broken(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the reward model's folder, to be broken."""
    return Path(shutil.copytree(folders[1], tmp_path / "broken"))


def settings(model: Path, clap: Path) -> RewardSettings:
    return load_settings(RewardSettings, model=f"file:{model}", clap=f"file:{clap}", device="cpu", threads=1)


def rehash(folder: Path) -> None:
    write_manifest(folder, name="broken", version="1", license="unknown")


def test_what_was_saved_is_loaded(folders: tuple[Path, Path]) -> None:
    clap, model = folders
    scorer = load(settings(model, clap))
    assert (scorer.version.name, scorer.version.version, scorer.clap.name) == (
        "tiny-reward",
        "2",
        "tiny-clap",
    )
    assert scorer.sampling_rate == 16_000


def test_another_clap_model_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_clap(seed=1).save(other)
    write_manifest(other, name="other", version="1", license="Apache-2.0")
    with pytest.raises(DigestMismatchError, match="tiny-clap"):
        load(settings(folders[1], other))


def test_a_missing_tensor_is_refused(folders: tuple[Path, Path], broken: Path) -> None:
    weights = load_file(broken / WEIGHTS_NAME)
    del weights["query"]
    save_file(weights, broken / WEIGHTS_NAME)
    rehash(broken)
    with pytest.raises(ModelFormatError, match="query") as caught:
        load(settings(broken, folders[0]))
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(folders: tuple[Path, Path], broken: Path) -> None:
    path = broken / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DigestMismatchError, match=WEIGHTS_NAME):
        load(settings(broken, folders[0]))
    rehash(broken)
    with pytest.raises(ModelFormatError, match="truncated"):
        load(settings(broken, folders[0]))


def test_a_pickle_is_refused(folders: tuple[Path, Path], broken: Path) -> None:
    weights = load_file(broken / WEIGHTS_NAME)
    (broken / WEIGHTS_NAME).unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    rehash(broken)
    with pytest.raises(ModelFormatError, match="pickle"):
        load(settings(broken, folders[0]))


def test_a_folder_of_something_else_is_refused(folders: tuple[Path, Path]) -> None:
    clap, model = folders
    with pytest.raises(ModelFormatError, match="no reward model"):
        load(settings(clap, clap))
    with pytest.raises(ModelFormatError, match=r"^clap: .*not a CLAP model"):
        load(settings(model, model))


def test_the_name_of_the_family_means_its_reward_model(folders: tuple[Path, Path]) -> None:
    def paths(model: str) -> list[tuple[str, str, str | None]]:
        return [
            (uri.scheme, uri.path, uri.digest) for uri in model_uris(RewardSettings(model=model)).values()
        ]

    pin = "sha256:" + "0" * 64
    clap = ("embedded", "clap-a", None)
    assert paths("mini") == [("embedded", "reward", None), clap]
    assert paths(f"mini#{pin}") == [("embedded", "reward", pin), clap]
    assert paths("mini:reward") == paths("mini")


def test_wrong_uris_are_named_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        model_uris(RewardSettings(model="x", clap="y"))
    assert [fault.field for fault in caught.value.violations] == ["model", "clap"]


def test_laions_own_package_shows_no_tokens(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "x.pt"
    checkpoint.write_bytes(b"x")
    config = RewardSettings(model=f"file:{folders[1]}", clap=f"laion-clap:{checkpoint}")
    with pytest.raises(InvalidInputError, match="laion:PATH"):
        load(config)


def test_an_absent_clap_model_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^clap: .*nowhere"):
        load(settings(folders[1], tmp_path / "nowhere"))


# The program

COMMAND = [sys.executable, "-m", "services.reward"]
ANY_PORT = {"MILONGA_LISTEN": "127.0.0.1:0"}


def test_the_program_refuses_in_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_clap(seed=1).save(other)
    env = environment(**ANY_PORT, MILONGA_MODEL=f"file:{folders[1]}", MILONGA_CLAP=f"file:{other}")
    done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith('{"'))
    assert line.startswith("error: ")
    assert "trained on the CLAP model tiny-clap" in line
