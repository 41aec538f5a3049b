"""The service as a program: what it loads, and what it refuses in one clear line."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.captioning.serve import describe, load
from services.captioning.settings import CaptioningSettings, model_uris
from services.catalogue import captioner_uri
from services.errors import DigestMismatchError, InvalidInputError, ModelFormatError
from services.models.manifest import write_manifest
from services.runtime.settings import load_settings
from tests.programs import environment
from tests.services.captioning.serving import write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny captioner and of a tiny CLAP model."""
    return write_models(tmp_path_factory.mktemp("models"))


def settings(model: Path, clap: Path | None = None, **others: Any) -> CaptioningSettings:
    uris = {"model": f"file:{model}"} | ({} if clap is None else {"clap": f"file:{clap}"})
    return load_settings(CaptioningSettings, **uris, device="cpu", threads=1, **others)


def test_what_was_saved_is_loaded(folders: tuple[Path, Path]) -> None:
    captioner, clap = folders
    loaded = load(settings(captioner, clap))
    fields = describe(loaded)
    assert (fields["model"], fields["version"], fields["refines"]) == ("tiny-captioner", "2", True)
    assert fields["clap"]["model"] == "tiny-clap"
    alone = describe(load(settings(captioner)))
    assert ("clap" in alone, alone["refines"]) == (False, False)
    remote = load(settings(captioner, scoring="localhost:50052"))
    assert describe(remote)["refines"]
    assert remote.refiner is not None


def test_the_language_model_can_have_fewer_bits(folders: tuple[Path, Path]) -> None:
    model = load(settings(folders[0], dtype="bfloat16")).worker.model
    assert str(model._captioner.language_model.dtype) == "torch.bfloat16"


def test_damaged_weights_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folders[0], tmp_path / "broken"))
    path = broken / "projector.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DigestMismatchError, match=r"projector\.safetensors"):
        load(settings(broken))
    write_manifest(broken, name="broken", version="1", license="unknown")
    with pytest.raises(ModelFormatError):
        load(settings(broken))


def test_a_folder_of_something_else_is_refused(folders: tuple[Path, Path]) -> None:
    captioner, clap = folders
    with pytest.raises(ModelFormatError, match="not a captioner"):
        load(settings(clap))
    with pytest.raises(ModelFormatError, match=r"^clap: .*not a CLAP model"):
        load(settings(captioner, captioner))


def test_the_name_of_the_family_means_its_captioner() -> None:
    pin = "#sha256:" + "0" * 64
    assert [captioner_uri(text) for text in ("mini", f"mini{pin}", "mini:x", "file:mini")] == [
        *("mini:captioner", f"mini:captioner{pin}", "mini:x", "file:mini"),
    ]


def test_the_clap_model_is_optional() -> None:
    assert list(model_uris(CaptioningSettings(model="file:x", clap="mini:clap-a"))) == ["caption", "clap"]
    assert list(model_uris(CaptioningSettings(model="file:x"))) == ["caption"]


def test_wrong_uris_are_named_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        model_uris(CaptioningSettings(model="x", clap="y"))
    assert [fault.field for fault in caught.value.violations] == ["model", "clap"]


def test_settings_of_a_scoring_service_need_one() -> None:
    with pytest.raises(InvalidInputError, match="give scoring too"):
        load_settings(CaptioningSettings, model="mini", scoring_scorer="a")


def test_the_program_refuses_in_one_line(folders: tuple[Path, Path]) -> None:
    values = {"MILONGA_MODEL": f"file:{folders[1]}", "MILONGA_LISTEN": "127.0.0.1:0"}
    command = [sys.executable, "-m", "services.captioning"]
    done = subprocess.run(
        command, env=environment(**values), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith('{"'))
    assert line.startswith("error: ")
    assert "not a captioner" in line
