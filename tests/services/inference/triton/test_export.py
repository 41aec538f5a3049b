"""`milonga triton export`, and what is read back of it where Triton loads a version."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.catalogue import SCORING
from services.cli import run
from services.cli.triton import MODELS, export_model
from services.errors import DigestMismatchError, InvalidInputError, ModelFormatError
from services.generation.settings import GenerationSettings
from services.inference.triton.repository import ModelRepository, open_storage
from services.inference.triton.serving import file_uri, read_settings, served_models
from services.models.manifest import read_manifest
from services.models.mini import mini_folder
from services.reward.settings import RewardSettings
from tests.services.inference.suite import version

CLAP = read_manifest(mini_folder("clap-a")).digest


def _config(repository: Path, model: str) -> Any:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


def test_the_repository_of_the_embedded_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "models"
    assert run(["triton", "export", "--model", "mini", "--set", "tango.exact=true", str(repository)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *(f"{name}/{version(name)}" for name in MODELS),
        "tritonserver",
    ]
    tango, clap, reward, caption, explain = (_config(repository, name) for name in MODELS)
    assert {one.backend for one in (tango, clap, reward, caption, explain)} == {"python"}
    assert (tango.model_transaction_policy.decoupled, tango.max_batch_size) == (True, 0)
    assert tango.parameters["exact"].string_value == "true"
    assert list(tango.version_policy.specific.versions) == [int(version("tango"))]
    assert (clap.max_batch_size, reward.max_batch_size, caption.max_batch_size) == (64, 64, 64)
    assert clap.HasField("dynamic_batching")
    assert [one.name for one in clap.input if one.allow_ragged_batch] == ["AUDIO"]
    assert "services.reward.triton" in (repository / "reward" / version("reward") / "model.py").read_text()
    found = served_models(repository / "clap" / version("clap"))
    assert {name: model.digest for name, model in found.items()} == {
        "clap-a": CLAP,
        "clap-b": read_manifest(mini_folder("clap-b")).digest,
    }
    # Again: nothing new, and it says so.
    assert run(["triton", "export", "--model", "mini", "--set", "tango.exact=true", str(repository)]) == 0
    assert capsys.readouterr().out.count("(there already)") == len(MODELS)


def test_a_later_version_is_next_to_the_pinned_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["triton", "export", "--only", "tango", str(tmp_path)]
    assert run([*export, "--model", "mini-base", "--version", version("tango")]) == 0
    assert run([*export, "--model", "mini"]) == 2
    assert "give another --version" in capsys.readouterr().err
    first = int(version("tango"))
    assert run([*export, "--model", "mini", "--version", str(first + 1)]) == 0
    assert f"pinned is {first}" in capsys.readouterr().out
    repository = ModelRepository(open_storage(str(tmp_path)))
    assert (repository.versions("tango"), repository.pinned("tango")) == ([first, first + 1], (first,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nonsense"], "--model: is 'nonsense'"),
        (["--model", "mini:clap-a"], "makes no sound"),
        (["--scorer", "a=laion-clap:/tmp/x.pt"], "--scorer a: is laion-clap:/tmp/x.pt"),
        (["--reward", "file:/nowhere"], "is no folder"),
        (["--only", "bark"], f"--only: is 'bark', must be one of {', '.join(MODELS)}"),
        (["--version", "3"], "--version: is for a single model; name it with --only"),
        (["--set", "exact=true"], "--set: is 'exact=true', must be MODEL.NAME=VALUE"),
        (
            ["--set", "tango.colour=red"],
            "--set tango.colour: is no setting of this model; use one of ",
        ),
        (["--set", "clap.max_batch_size=many"], "--set clap.max_batch_size: is 'many': Input should be"),
        (["--set", "tango.exact=maybe"], "--set tango.exact: is 'maybe': Input should be a valid boolean"),
        (["--scorer", "../../x=mini:clap-a"], "the name '../../x'"),
    ],
)
def test_wrong_input_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(["triton", "export", *arguments, str(tmp_path / "models")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_what_is_exported_later_changes_nothing_of_what_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["triton", "export", str(tmp_path), "--only"]
    assert run([*export, "tango", "--model", "mini-base", "--set", "tango.exact=true"]) == 0
    config = tmp_path / "tango" / "config.pbtxt"
    config.write_text(
        config.read_text() + 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "x" } }\n'
    )
    before, later = config.read_text(), str(int(version("tango")) + 1)
    assert run([*export, "tango", "--model", "mini", "--version", later]) == 0
    assert config.read_text() == before
    assert run([*export, "tango", "--model", "mini", "--version", later, "--set", "tango.threads=2"]) == 0
    settings = {name: one.string_value for name, one in _config(tmp_path, "tango").parameters.items()}
    assert settings == {"exact": "true", "EXECUTION_ENV_PATH": "x", "threads": "2"}
    # Columns of SCORE stay as many, and in their order.
    assert run([*export, "clap"]) == 0
    capsys.readouterr()
    later = str(int(version("clap")) + 1)
    assert run([*export, "clap", "--version", later, "--scorer", "a=mini:clap-a"]) == 2
    assert "clap: has other outputs in config.pbtxt than this version" in capsys.readouterr().err
    swapped = ["--scorer", "clap-b=mini:clap-b", "--scorer", "clap-a=mini:clap-a"]
    assert run([*export, "clap", *swapped]) == 2
    assert "with other weights" in capsys.readouterr().err
    assert not (tmp_path / "clap" / later).exists()


def test_a_laion_checkpoint_takes_its_tokenizer_along(tmp_path: Path) -> None:
    checkpoint = tmp_path / "laion" / "tiny.pt"
    (tmp_path / "laion" / "roberta-base").mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    (tmp_path / "laion" / "roberta-base" / "vocab.json").write_text("{}")
    exported, number = export_model(SCORING, {"scorers": {"a": f"laion:{checkpoint}"}})
    assert number == 1
    ModelRepository(open_storage(str(tmp_path / "models"))).add(exported, number)
    folder = tmp_path / "models" / "clap" / "1"
    assert (folder / "weights" / "a" / "roberta-base" / "vocab.json").exists()
    model = served_models(folder)["a"]
    assert file_uri(model) == f"laion:{folder / 'weights' / 'a' / 'tiny.pt'}#{model.digest}"
    (folder / "weights" / "a" / "tiny.pt").write_bytes(b"others")
    with pytest.raises(DigestMismatchError):
        served_models(folder)


def test_what_is_served_is_known_by_its_registered_name(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    shutil.copytree(mini_folder("clap-a"), folder / "weights" / "clap")
    served = {"name": "milonga-clap", "version": "7", "digest": CLAP}
    (folder / "served.json").write_text(json.dumps({"format": 1, "weights": {"clap": served}}))
    model = served_models(folder)["clap"]
    assert (model.identity.name, model.identity.version, model.digest) == ("milonga-clap", "7", CLAP)
    for wrong in ("", "[]", '{"format": 2, "weights": {}}', '{"format": 1, "weights": {"clap": {}}}'):
        (folder / "served.json").write_text(wrong)
        with pytest.raises(ModelFormatError, match="milonga triton export"):
            served_models(folder)


def test_parameters_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings(GenerationSettings, {"exact": "true", "batch_shapes": "[2, 4]"}, model="mini")
    assert (settings.exact, settings.batch_shapes, settings.model) == (True, (2, 4), "mini")
    monkeypatch.setenv("MILONGA_EXACT", "false")
    assert read_settings(GenerationSettings, {"exact": "true", "EXECUTION_ENV_PATH": "x"}, model="mini").exact
    assert os.environ["MILONGA_EXACT"] == "false"
    with pytest.raises(InvalidInputError, match=r"parameters\.colour: is no setting of this model"):
        read_settings(RewardSettings, {"colour": "red"}, model="mini")
    with pytest.raises(InvalidInputError, match=r"parameters\.model: is no setting"):
        read_settings(RewardSettings, {"model": "mini"}, model="mini")
