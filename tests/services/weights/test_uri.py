import hashlib
import os
import socket
import sys
from pathlib import Path

import pytest

from services.errors import (
    DigestMismatchError,
    InvalidInputError,
    ModelError,
    ModelNotFoundError,
    ServiceUnavailableError,
)
from services.models.manifest import write_manifest
from services.weights.registry import LOCAL_STORE
from services.weights.uri import ModelURI, resolve
from tests.tiny import tiny_pipeline

PIN = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "scheme", "path", "digest"),
    [
        ("mini", "embedded", "mini", None),
        ("mini-base#" + PIN, "embedded", "mini-base", PIN),
        ("file:/models/tango2", "file", "/models/tango2", None),
        ("file:tango2#" + PIN, "file", "tango2", PIN),
        ("hf:declare-lab/tango2@main", "hf", "declare-lab/tango2@main", None),
        ("mini:clap-a", "embedded", "clap-a", None),
        ("mini:mini", "embedded", "mini", None),
        ("laion:/models/630k-audioset-best.pt#" + PIN, "laion", "/models/630k-audioset-best.pt", PIN),
        ("laion-clap:best.pt", "laion-clap", "best.pt", None),
        ("models:/tango/3", "models", "/tango/3", None),
        ("models:/milonga-tango@champion#" + PIN, "models", "/milonga-tango@champion", PIN),
    ],
)
def test_a_uri_is_taken_apart(text: str, scheme: str, path: str, digest: str | None) -> None:
    assert ModelURI.parse(text) == ModelURI(scheme=scheme, path=path, digest=digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "maxi",
        "file:",
        "http://x",
        "hf:tango2",
        "hf:../../etc",
        "mini#",
        "mini:",
        "mini:../tagger",
        "laion:",
        "laion-clap",
        "models:/tango",
        "models:/tango/latest",
        "models:/tango/3/../4",
        "models:/../tango/3",
        "models:tango@",
        "mini#sha256:12",
        "mini#md5:" + "0" * 64,
        "file:/models/" + "é" * 128,
        "file:/models" + "/tango" * 700,
        "models:/" + "t" * 256 + "/3",
    ],
)
def test_what_is_no_model_uri_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ModelURI.parse(text)
    assert [v.field for v in caught.value.violations] == ["model"]
    assert "\n" not in str(caught.value)


def test_the_refusal_lists_every_form_and_every_member() -> None:
    with pytest.raises(InvalidInputError, match=r"mini:NAME, file:PATH.*laion:PATH, laion-clap:PATH"):
        ModelURI.parse("maxi")
    with pytest.raises(InvalidInputError, match=r"clap-a, clap-b, reward"):
        ModelURI.parse("mini:clap-c")


def test_nothing_is_where_the_uri_points(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="absent"):
        resolve(f"file:{tmp_path}/absent")


# tests/training/tracking/test_register.py tests that a registered version resolves to its files.


def test_without_mlflow_a_registry_uri_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModelError, match="pip install 'mlflow-skinny") as caught:
        resolve("models:/tango/3")
    assert "\n" not in str(caught.value)


def test_without_a_registry_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelNotFoundError, match=f"{LOCAL_STORE}.*MLFLOW_TRACKING_URI"):
        resolve("models:/tango@champion")
    assert list(tmp_path.iterdir()) == []


def test_a_registry_that_is_not_there_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ServiceUnavailableError, match="refused") as caught:
            resolve("models:/tango/3")
    assert "\n" not in str(caught.value)


def test_a_pinned_version_in_the_cache_needs_no_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    made = tmp_path / "made"
    tiny_pipeline().save_pretrained(made)
    digest = write_manifest(made, name="tuned", version="7", license="MIT").digest
    (tmp_path / "models").mkdir()
    kept = made.rename(tmp_path / "models" / digest.removeprefix("sha256:"))
    found = resolve(f"models:/milonga-tango/3#{digest}")
    assert (found.folder, found.identity.name, found.identity.version) == (kept, "milonga-tango", "3")
    assert (found.digest, found.identity.license) == (digest, "MIT")
    # An alias may have moved, and damaged files are none.
    with pytest.raises(ModelError, match="mlflow"):
        resolve(f"models:/milonga-tango@champion#{digest}")
    (kept / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="mlflow"):
        resolve(f"models:/milonga-tango/3#{digest}")
    assert not kept.exists()


def test_a_folder_resolves_to_its_digest_and_the_pin_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny_pipeline().save_pretrained(folder)
    model = resolve(f"file:{folder}")
    assert (model.folder, model.identity.name) == (folder, "tiny")
    assert resolve(f"file:{folder}#{model.digest}") == model
    with pytest.raises(DigestMismatchError) as caught:
        resolve(f"file:{folder}#{PIN}")
    assert "\n" not in str(caught.value)


def test_a_member_of_the_family_resolves_to_its_folder() -> None:
    model = resolve("mini:tagger")
    assert model.folder.name == "tagger"
    assert resolve("mini:mini") == resolve("mini")


@pytest.mark.parametrize("scheme", ["laion", "laion-clap"])
def test_a_laion_checkpoint_is_known_by_its_bytes(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "630k-best.pt"
    path.write_bytes(b"weights")
    model = resolve(f"{scheme}:{path}")
    assert (model.folder, model.identity.name, model.identity.version) == (path, "630k-best", "unversioned")
    assert model.identity.license == "unknown"
    assert model.digest == f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
    assert resolve(f"{scheme}:{path}#{model.digest}") == model
    with pytest.raises(DigestMismatchError, match=PIN) as caught:
        resolve(f"{scheme}:{path}#{PIN}")
    assert "\n" not in str(caught.value)
    for missing in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(ModelNotFoundError, match="LAION checkpoint"):
            resolve(f"{scheme}:{missing}")


def test_a_registry_leaves_the_hub_to_other_models_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelNotFoundError):
        resolve("models:/tango/1", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert "HF_HUB_OFFLINE" not in os.environ
