"""`milonga fetch`: what an init container runs before the service starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from services import cli
from services.models.manifest import verify_manifest, write_manifest
from services.models.mini import mini_folder
from services.weights.registry import DIGEST_TAG, FOLDER_TAG
from tests.tiny import tiny_pipeline


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("MILONGA_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))


def _fetched(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert cli.run(["fetch", *arguments, "--json"]) == 0
    found: dict[str, str] = json.loads(capsys.readouterr().out)
    return found


def test_it_says_what_was_found_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fetch", "mini"]) == 0
    printed = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert printed == _fetched(capsys, "mini")
    manifest = verify_manifest(mini_folder("mini"))
    assert (printed["name"], printed["version"]) == (manifest.name, manifest.version)
    assert (printed["digest"], printed["folder"]) == (manifest.digest, str(mini_folder("mini")))


def test_the_argument_goes_before_the_pin_and_the_pin_before_what_is_unpinned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILONGA_MODEL", "")
    monkeypatch.setenv("MILONGA_UNPINNED_MODEL", "mini:clap-b")
    assert _fetched(capsys)["folder"].endswith("clap-b")
    monkeypatch.setenv("MILONGA_MODEL", "mini:clap-a")
    assert _fetched(capsys)["folder"].endswith("clap-a")
    assert _fetched(capsys, "mini:reward")["folder"].endswith("reward")


@pytest.mark.parametrize("unset", [{}, {"MILONGA_MODEL": "", "MILONGA_UNPINNED_MODEL": ""}])
def test_without_a_pin_one_line_says_so_and_what_sets_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unset: dict[str, str]
) -> None:
    for name, value in unset.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["fetch"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model: is empty: there is no pin; `milonga promote bootstrap` sets one")


def test_what_is_refused_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    for uri in ("maxi", f"mini#sha256:{'0' * 64}", "file:/absent"):
        assert cli.run(["fetch", uri]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# MLflow's own query, of its registry on SQLite: elsewhere in these tests that is another process.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_a_pinned_version_is_fetched_once_and_then_needs_no_registry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store" / "artifacts" / "model"
    tiny_pipeline().save_pretrained(folder)
    digest = write_manifest(folder, name="tuned", version="3", license="Apache-2.0").digest
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    client = MlflowClient(store, store)
    client.create_registered_model("milonga-tango")
    tags = {DIGEST_TAG: digest, FOLDER_TAG: "artifacts/model"}
    client.create_model_version("milonga-tango", f"file://{tmp_path}/store", tags=tags)
    pin = f"models:/milonga-tango/1#{digest}"
    found = _fetched(capsys, pin)
    assert (found["name"], found["version"], found["digest"]) == ("milonga-tango", "1", digest)
    assert Path(found["folder"]).is_relative_to(tmp_path / "cache")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert _fetched(capsys, pin) == found
    shutil.rmtree(found["folder"])
    assert cli.run(["fetch", pin]) == 3
    assert "can't be used" in capsys.readouterr().err


def test_it_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from services import cli; code = cli.run(['fetch', 'mini']); "
        "print(code, sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=paths, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
