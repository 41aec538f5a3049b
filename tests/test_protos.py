"""The stubs and their generator."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

PROTOS = Path(__file__).parents[1] / "protos"


@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("protos_generate", PROTOS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("*_pb2*", "__pycache__", ".generated")
    shutil.copytree(PROTOS / "milonga", tmp_path / "milonga", ignore=ignore)
    return tmp_path


def test_stubs_are_made_once_and_again_when_a_proto_changes(generator: ModuleType, sources: Path) -> None:
    assert generator.generate(sources)
    assert all((sources / stub).is_file() for stub in generator.stub_files(sources))
    assert not generator.generate(sources)
    proto = sources / "milonga/v1/audio.proto"
    proto.write_text(proto.read_text() + "\n// Changed.\n")
    assert generator.generate(sources)
    (sources / "milonga/v1/audio_pb2.py").unlink()
    assert generator.generate(sources)


def test_a_fault_in_a_proto_leaves_the_old_stubs_alone(generator: ModuleType, sources: Path) -> None:
    generator.generate(sources)
    before = (sources / "milonga/v1/audio_pb2.py").read_bytes()
    (sources / "milonga/v1/audio.proto").write_text("syntax = nonsense")
    with pytest.raises(RuntimeError, match="protoc failed"):
        generator.generate(sources)
    assert (sources / "milonga/v1/audio_pb2.py").read_bytes() == before
    assert not list(sources.glob(".stubs-*"))
