"""The files of a Triton repository: what is put there, what is pinned, and what is refused."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.errors import (
    InvalidInputError,
    MilongaError,
    ModelFormatError,
    OutputError,
    ServiceUnavailableError,
)
from services.inference.triton.repository import ModelExport, ModelRepository, Weights, open_storage
from services.inference.triton.storage import S3Place, S3Storage, Storage
from services.models.manifest import verify_manifest, write_manifest

CODE = "from services.inference.triton.backend import TritonPythonModel\n"


def exported(
    folder: Path, text: str = "a", *, code: str = CODE, name: str = "tango", rows: int = 8
) -> ModelExport:
    """A model of one small file that says `text`."""
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "config.json").write_text(json.dumps(text))
    (folder / ".cache").mkdir(exist_ok=True)
    (folder / ".cache" / "lock").write_text("none of the model's")
    manifest = write_manifest(folder, name="tiny", version="1", license="Apache-2.0")
    config = ModelConfig(name=name, backend="python")
    config.parameters["max_rows"].string_value = str(rows)
    weights = Weights(name="milonga-tango", version="7", digest=manifest.digest, folder=folder)
    return ModelExport(config=config, code=code, weights={"tango": weights})


class Bucket:
    """What is used of boto3's client, in memory."""

    class NoSuchKey(Exception):
        response: Mapping[str, Any] = {}

    exceptions = SimpleNamespace(NoSuchKey=NoSuchKey)

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.order: list[str] = []
        self.fails: Exception | None = None

    def get_object(self, *, Bucket: str, Key: str) -> Any:
        self._check(Bucket)
        if Key not in self.objects:
            raise self.NoSuchKey
        return {"Body": io.BytesIO(self.objects[Key])}

    def put_object(self, *, Bucket: str, Key: str, Body: bytes) -> None:
        self._check(Bucket)
        self.objects[Key] = Body
        self.order.append(Key)

    def upload_file(self, path: str, bucket: str, key: str) -> None:
        self.put_object(Bucket=bucket, Key=key, Body=Path(path).read_bytes())

    def delete_object(self, *, Bucket: str, Key: str) -> None:
        self._check(Bucket)
        del self.objects[Key]
        self.order.append(f"-{Key}")

    def get_paginator(self, name: str) -> Any:
        assert name == "list_objects_v2"
        return SimpleNamespace(paginate=self._pages)

    def _pages(self, *, Bucket: str, Prefix: str, Delimiter: str = "") -> Iterator[Any]:
        self._check(Bucket)
        for key in sorted(self.objects):  # a page for each
            inside = key.removeprefix(Prefix)
            if not key.startswith(Prefix):
                continue
            if Delimiter and Delimiter in inside:
                yield {"CommonPrefixes": [{"Prefix": Prefix + inside.partition(Delimiter)[0] + Delimiter}]}
            else:
                yield {"Contents": [{"Key": key}]}

    def _check(self, bucket: str) -> None:
        assert bucket == "models"
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture(params=["folder", "s3", "s3, whole bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, bucket: Bucket) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "repository"))
    return S3Storage("s3://models/triton/one" if request.param == "s3" else "s3://h:1/models", bucket)


def test_versions_stay_next_to_each_other_and_the_pin_stays(place: Storage, tmp_path: Path) -> None:
    repository = ModelRepository(place)
    assert (repository.versions("tango"), repository.pinned("tango")) == ([], ())
    assert repository.config("tango") is None
    first, second = exported(tmp_path / "a"), exported(tmp_path / "b", "b", rows=4)
    assert repository.add(first, 7)
    assert repository.pinned("tango") == (7,)
    assert repository.add(second, 10)
    assert (repository.versions("tango"), repository.pinned("tango")) == ([7, 10], (7,))
    config = repository.config("tango")
    assert config is not None
    assert config.parameters["max_rows"].string_value == "4"  # renewed but for the pin
    assert list(config.version_policy.specific.versions) == [7]

    repository.pin("tango", 10, 7)
    assert repository.pinned("tango") == (7, 10)
    repository.pin("tango", 10)
    assert repository.pinned("tango") == (10,)
    written = place.read("tango/config.pbtxt")
    assert written is not None
    expected = ModelConfig()
    expected.CopyFrom(second.config)
    specific = model_config_pb2.ModelVersionPolicy.Specific(versions=[10])
    expected.version_policy.CopyFrom(model_config_pb2.ModelVersionPolicy(specific=specific))
    assert text_format.Parse(written.decode(), ModelConfig()) == expected

    (weights,) = repository.weights("tango", 7).values()
    digest = first.weights["tango"].digest
    assert weights == Weights(name="milonga-tango", version="7", digest=digest, folder=None)
    repository.remove("tango")
    repository.remove("tango")
    assert (repository.versions("tango"), place.names("tango")) == ([], [])


def test_the_folder_is_whole_and_the_models_own(tmp_path: Path) -> None:
    repository = ModelRepository(open_storage(str(tmp_path / "repository")))
    repository.add(exported(tmp_path / "a"), 7)
    root = tmp_path / "repository" / "tango"
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert found == [
        *("7/__pycache__", "7/model.py", "7/served.json"),
        *("7/weights/tango/milonga.json", "7/weights/tango/unet/config.json", "config.pbtxt"),
    ]
    assert verify_manifest(root / "7" / "weights" / "tango").name == "tiny"
    assert (root / "7" / "model.py").read_text() == CODE
    mode = (root / "config.pbtxt").stat().st_mode
    umask = os.umask(0)
    os.umask(umask)
    assert mode & 0o777 == 0o666 & ~umask  # Triton may be another user


def test_the_same_version_again(place: Storage, tmp_path: Path) -> None:
    repository = ModelRepository(place)
    one = exported(tmp_path / "a")
    assert repository.add(one, 7)
    assert not repository.add(one, 7)
    assert repository.add(exported(tmp_path / "a", code="# newer\n"), 7)
    assert repository.code("tango", 7) == "# newer\n"
    named = {"tango": replace(one.weights["tango"], name="elsewhere", version="1")}
    assert repository.add(replace(one, weights=named, code="# newer\n"), 7)
    assert repository.weights("tango", 7)["tango"].name == "elsewhere"
    with pytest.raises(InvalidInputError, match=r"--version: is 7, but .* other weights \(sha256:.*another"):
        repository.add(exported(tmp_path / "b", "b"), 7)
    with pytest.raises(InvalidInputError, match="--version: is 0, must be at least 1"):
        repository.add(one, 0)
    assert repository.pinned("tango") == (7,)


def test_what_is_not_there(place: Storage, tmp_path: Path) -> None:
    repository = ModelRepository(place)
    with pytest.raises(InvalidInputError, match="has no model tango; export it with `milonga triton export`"):
        repository.pin("tango", 1)
    for read in (repository.weights, repository.code):
        with pytest.raises(InvalidInputError, match="tango: has no version 1; export it"):
            read("tango", 1)
    repository.add(exported(tmp_path / "a"), 7)
    with pytest.raises(InvalidInputError, match="has no version 8, 9; it has 7"):
        repository.pin("tango", 9, 7, 8)
    with pytest.raises(InvalidInputError, match="has no version to pin; it has 7"):
        repository.pin("tango")
    place.write("tango/7/served.json", b'{"format": 2}')
    with pytest.raises(ModelFormatError, match="format 2, this release reads 1"):
        repository.weights("tango", 7)
    place.write("tango/config.pbtxt", b'name: "tango"\nnonsense: 1\n')
    with pytest.raises(ModelFormatError, match=r"config.pbtxt is not a model configuration \(2:1.*nonsense"):
        repository.pinned("tango")


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    repository = ModelRepository(open_storage(str(tmp_path / "repository")))
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfile", full)
        with pytest.raises(OutputError, match="tango/7 can't be written: No space left on device"):
            repository.add(exported(tmp_path / "a"), 7)
    assert list((tmp_path / "repository" / "tango").iterdir()) == []
    (tmp_path / "repository" / "tango" / "7").mkdir()
    (tmp_path / "repository" / "tango" / "7" / "model.py").write_text("# somebody's own")
    with pytest.raises(OutputError, match="tango/7 can't be written"):
        repository.add(exported(tmp_path / "b", "b"), 7)
    assert (tmp_path / "repository" / "tango" / "7" / "model.py").read_text() == "# somebody's own"


def test_python_leaves_no_bytecode_in_a_version_folder(tmp_path: Path) -> None:
    repository = ModelRepository(open_storage(str(tmp_path / "repository")))
    repository.add(exported(tmp_path / "a", code="DONE = 1\n"), 7)
    folder = tmp_path / "repository" / "tango" / "7"
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    done = subprocess.run(
        [sys.executable, "-c", "import model; print(model.DONE)"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder)},
        check=True,
    )
    assert done.stdout == "1\n"
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_what_killed_exports_left_goes_after_a_day(tmp_path: Path) -> None:
    repository = ModelRepository(open_storage(str(tmp_path / "repository")))
    for name, age in (("old", 90_000.0), ("new", 60.0)):
        part = tmp_path / "repository" / "tango" / f".part-7-{name}"
        part.mkdir(parents=True)
        os.utime(part, (time.time() - age,) * 2)
    repository.add(exported(tmp_path / "a"), 7)
    assert sorted(p.name for p in (tmp_path / "repository" / "tango").iterdir()) == [
        *(".part-7-new", "7", "config.pbtxt")
    ]
    assert repository.storage.names("tango") == ["7", "config.pbtxt"]


def test_another_process_was_faster(tmp_path: Path) -> None:
    repository = ModelRepository(open_storage(str(tmp_path / "repository")))
    one = exported(tmp_path / "a")
    put = repository.storage.put_folder

    def late(path: str, files: Mapping[str, bytes | Path]) -> None:
        put(path, files)
        put(path, files)

    repository.storage.put_folder = late  # type: ignore[method-assign]
    assert not repository.add(one, 7)
    assert repository.pinned("tango") == (7,)


def test_on_s3_the_mark_of_wholeness_comes_last_and_goes_first(bucket: Bucket, tmp_path: Path) -> None:
    repository = ModelRepository(S3Storage("s3://models/triton", bucket))
    bucket.objects["triton/tango/7/weights/tango/left.bin"] = b"of one that was not finished"
    assert repository.versions("tango") == []
    repository.add(exported(tmp_path / "a"), 7)
    assert sorted(bucket.objects) == [
        "triton/tango/7/__pycache__",
        "triton/tango/7/model.py",
        "triton/tango/7/served.json",
        "triton/tango/7/weights/tango/milonga.json",
        "triton/tango/7/weights/tango/unet/config.json",
        "triton/tango/config.pbtxt",
    ]
    assert bucket.order[0] == "-triton/tango/7/weights/tango/left.bin"
    assert bucket.order[-2:] == ["triton/tango/7/served.json", "triton/tango/config.pbtxt"]
    bucket.objects["triton/tango-challenger/1/served.json"] = b"of another model"
    bucket.order.clear()
    repository.remove("tango")
    assert bucket.order[0] == "-triton/tango/7/served.json"
    assert list(bucket.objects) == ["triton/tango-challenger/1/served.json"]


class Refused(Exception):
    """As botocore's ClientError: carries the answer."""

    response: Mapping[str, Any] = {}


class Unreachable(Exception):
    """As botocore's EndpointConnectionError."""


Refused.__module__ = Unreachable.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (Refused("Access Denied"), OutputError, "Access Denied; correct the location, or AWS_ACCESS_KEY_ID"),
        (Unreachable("Could not connect"), ServiceUnavailableError, "S3 does not respond: Could not connect"),
        (PermissionError(13, "Permission denied"), OutputError, "Permission denied"),
        (KeyError("ours"), KeyError, "ours"),
    ],
)
def test_why_s3_failed(bucket: Bucket, error: Exception, expected: type[Exception], words: str) -> None:
    bucket.fails = error
    place = S3Storage("s3://models/triton", bucket)
    for call in (
        lambda: place.read("a"),
        lambda: place.names("a"),
        lambda: place.remove("a"),
        lambda: place.write("a", b""),
    ):
        with pytest.raises(expected, match=words) as caught:
            call()
        if isinstance(caught.value, MilongaError):
            assert str(caught.value).startswith("s3://models/triton/a: ")


@pytest.mark.parametrize(
    ("text", "endpoint", "bucket_name", "prefix"),
    [
        ("s3://models", None, "models", ""),
        ("s3://models/", None, "models", ""),
        ("s3://my.models/a/b-c_d", None, "my.models", "a/b-c_d"),
        ("s3://localhost:9000/models/triton", "http://localhost:9000", "models", "triton"),
        ("s3://http://10.0.0.1:9000/models", "http://10.0.0.1:9000", "models", ""),
        ("s3://https://s3.example.com:443/models/t", "https://s3.example.com:443", "models", "t"),
    ],
)
def test_places_on_s3_are_named_as_triton_names_them(
    text: str, endpoint: str | None, bucket_name: str, prefix: str
) -> None:
    assert S3Place.parse(text) == S3Place(endpoint=endpoint, bucket=bucket_name, prefix=prefix)


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://https://models/t",
        "s3://MODELS",
        "s3://models/a b",
        "gs://models",
        "",
        "http://h:1/models",
    ],
)
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"repository: is '.*', must be a folder, s3://BUCKET/PREFIX"):
        open_storage(text)


def test_a_folder_that_can_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    repository = ModelRepository(open_storage(str(tmp_path / "file")))
    assert repository.versions("tango") == []
    with pytest.raises(OutputError, match="can't be written: Not a directory"):
        repository.add(exported(tmp_path / "a"), 7)


def test_without_boto3_s3_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(
        MilongaError, match=r"needs boto3, which is not installed; pip install 'milonga\[store"
    ):
        open_storage("s3://models/triton")
