"""Model folders and their digests."""

import hashlib
import json
from pathlib import Path

import pytest

from services.errors import DigestMismatchError, ModelFormatError, ModelNotFoundError
from services.models.manifest import MANIFEST_NAME, hash_file, read_manifest, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "weights.safetensors").write_bytes(b"\x00\x01")
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


def test_digest_against_its_definition(folder: Path) -> None:
    index, weights = (hashlib.sha256(data).hexdigest() for data in (b"{}", b"\x00\x01"))
    lines = f"model_index.json {index}\nunet/weights.safetensors {weights}\n"
    manifest = write_manifest(folder, "mini", "3", "Apache-2.0")
    assert manifest.digest == "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    stored = json.loads((folder / MANIFEST_NAME).read_text())
    assert stored["format"] == 1 and stored["files"]["model_index.json"] == index
    assert read_manifest(folder) == verify_manifest(folder, manifest.digest) == manifest


def test_writing_again_changes_nothing(folder: Path) -> None:
    first = write_manifest(folder, "mini", "3", "Apache-2.0")
    (folder / "README.md").write_text(f"Measured on {first.digest}.")
    (folder / ".cache").write_text("")
    assert write_manifest(folder, "mini", "3", "Apache-2.0") == verify_manifest(folder) == first


def test_folder_without_manifest_is_described(folder: Path) -> None:
    manifest = verify_manifest(folder)
    assert (manifest.name, manifest.version, manifest.license) == ("model", "unversioned", "unknown")
    assert manifest.digest == write_manifest(folder, "mini", "3", "MIT").digest


def test_every_change_is_noticed(folder: Path) -> None:
    write_manifest(folder, "mini", "3", "MIT")
    weights = folder / "unet" / "weights.safetensors"
    for change in (lambda: weights.write_bytes(b"\x00\x02"), lambda: (folder / "new.json").write_text(""),
                   weights.unlink):  # fmt: skip
        write_manifest(folder, "mini", "3", "MIT")
        change()
        with pytest.raises(DigestMismatchError, match=r"its manifest: (unet/weights|new\.json)"):
            verify_manifest(folder)


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "clap.pt"
    for content in (b"weights", b"other weights"):
        path.write_bytes(content)
        assert hash_file(path) == hashlib.sha256(content).hexdigest()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        hash_file(path)


def test_other_version_is_refused(folder: Path) -> None:
    write_manifest(folder, "mini", "3", "MIT")
    with pytest.raises(DigestMismatchError, match="not sha256:abcd"):
        verify_manifest(folder, "sha256:abcd")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "name": 3, "files": {}}'])
def test_malformed_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ModelFormatError, match="is not a manifest"):
        verify_manifest(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a folder"):
        verify_manifest(tmp_path / "nowhere")
