"""Adapters through gRPC, the Open Inference Protocol, Triton's files and the command."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton

from services.api.generation import Finished
from services.cli import run
from services.client import AudioClient
from services.engine import Engine
from services.errors import InvalidInputError, ModelFormatError, ModelNotFoundError
from services.generation.settings import GenerationSettings
from services.generation.slot import load_engine
from services.generation.triton import open_model
from services.models.manifest import write_manifest
from services.runtime.settings import load_settings
from services.weights.uri import resolve
from tests.services.generation.serving import Serving, serving
from tests.services.generation.test_families import _Patient
from tests.services.inference.asking import tensor
from tests.tiny import tiny_adapter, tiny_pipeline, tiny_tangoflux

PROMPT = "a dog barks"
TOKEN = "of-the-operator"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its adapters `warm` and `cold`, and `other` of another family."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(root / "base")
    base = write_manifest(root / "base", name="base", version="1", license="Apache-2.0")
    tiny_adapter(root / "warm", pipeline, seed=1)
    tiny_adapter(root / "cold", pipeline, seed=2, rank=2)
    tiny_adapter(root / "other", tiny_tangoflux())
    for name, digest in (("warm", base.digest), ("cold", "sha256:" + "1" * 64), ("other", base.digest)):
        config = root / name / "adapter_config.json"
        stated = {
            **json.loads(config.read_text()),
            "base_model_name_or_path": f"file:{root / 'base'}#{digest}",
        }
        config.write_text(json.dumps(stated))
        write_manifest(root / name, name=name, version="2", license="CC-BY-4.0")
    return root


def settings_of(folders: Path, **adapters: str) -> GenerationSettings:
    listed = {name: f"file:{folders / folder}" for name, folder in adapters.items()}
    return load_settings(
        GenerationSettings,
        model=f"file:{folders / 'base'}",
        adapters=listed,
        device="cpu",
        threads=1,
        batch_shapes=(4,),
        exact=True,
    )


@pytest.fixture(scope="module")
def engine(folders: Path) -> Iterator[Engine]:
    settings = settings_of(folders, warm="warm", cold="cold")
    with load_engine(settings, resolve(settings.model)) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Serving]:
    with serving(engine) as served:
        yield served


def test_grpc(served: Serving, engine: Engine) -> None:
    options: Any = {"seed": 7, "num_inference_steps": 3, "encoding": "float32"}
    with AudioClient(served.target, retries=0, timeout=60) as client:
        assert client.get_model().limits.adapters == ("warm", "cold")
        bare = client.generate(PROMPT, **options)
        warm = client.generate(PROMPT, adapter="warm", **options)
        *_, finished = client.stream(PROMPT, adapter="cold", **options)
        with pytest.raises(InvalidInputError, match="adapter: is 'hot', must be one of warm, cold"):
            client.generate(PROMPT, adapter="hot", **options)
        with pytest.raises(InvalidInputError, match="adapter: is 'hot'"):
            list(client.stream(PROMPT, adapter="hot", **options))
    expected = engine.generate(engine.request(PROMPT, adapter="warm", **options)).clips[0]
    assert bare.adapter is None
    assert warm.adapter is not None and (warm.adapter.name, warm.adapter.version) == ("warm", "2")
    assert warm.clips[0].audio == expected.audio != bare.clips[0].audio
    assert not warm.warnings
    assert isinstance(finished, Finished) and finished.adapter is not None
    (warning,) = finished.warnings
    assert "adapter cold was trained from file:" in warning and "its effect may differ" in warning


def test_rows_of_the_open_inference_protocol_have_their_own(served: Serving, engine: Engine) -> None:
    inputs = [
        tensor("PROMPT", "BYTES", [PROMPT, PROMPT, PROMPT]),
        tensor("SEED", "INT64", [7]),
        tensor("NUM_INFERENCE_STEPS", "INT32", [3]),
        tensor("ADAPTER", "BYTES", ["warm", "", "cold"]),
    ]
    with triton.InferenceServerClient(served.target) as client:
        answer = client.infer("tango", inputs)
        config = client.get_model_config("tango", as_json=True)["config"]
    assert config["parameters"]["adapters"]["string_value"] == "warm,cold"
    for row, name in enumerate(("warm", "", "cold")):
        request = engine.request(PROMPT, seed=7, num_inference_steps=3, adapter=name)
        assert answer.as_numpy("AUDIO")[row].tobytes() == engine.generate(request).clips[0].audio
    digests = answer.get_response().parameters["adapter_digests"].string_param.split("\n")
    assert [len(digest) for digest in digests] == [71, 71]


def test_a_switch_keeps_the_list(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    load = partial(load_engine, settings_of(folders, warm="warm"))
    tiny_pipeline(seed=4).save_pretrained(tmp_path / "next")
    write_manifest(tmp_path / "next", name="next", version="1", license="Apache-2.0")
    warm = f"file:{folders / 'warm'}"
    with load(resolve(f"file:{folders / 'base'}")) as base, serving(base, token=TOKEN, load=load) as served:
        with AudioClient(served.target, retries=0, timeout=60) as client:
            client.switch_model(f"file:{tmp_path / 'next'}", token=TOKEN)
            made = client.generate(PROMPT, adapter="warm", num_inference_steps=2, seed=1)
            assert made.adapter is not None and "adapter warm was trained from" in made.warnings[0]
            # The URI of an adapter names the model that it is merged into.
            merged = client.switch_model(warm, token=TOKEN).current
            assert (merged.name, merged.digest) == ("warm", resolve(warm).digest)
        served.run(served.slot.close())


def test_a_service_does_not_start_with_an_adapter_of_another_architecture(folders: Path) -> None:
    settings = settings_of(folders, other="other")
    with pytest.raises(InvalidInputError, match=r"of another architecture: .* train one from this"):
        load_engine(settings, resolve(settings.model))
    with pytest.raises(ModelFormatError, match="is an adapter of another architecture"):
        resolve(f"file:{folders / 'other'}")


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (None, "does not state the model that it was trained from"),
        ("cvssp/audioldm2", "base_model_name_or_path is 'cvssp/audioldm2', must be mini"),
        ("file:{folder}", "is an adapter of itself"),
        ("file:/usr/lib", "is no model folder; correct base_model_name_or_path"),
        ("laion:/etc/hostname", "can't be the base of an adapter in file:"),
        ("hf:someone/else", "can't be the base of an adapter in file:"),
    ],
)
def test_an_adapters_own_word_on_its_base_is_not_trusted(
    folders: Path, tmp_path: Path, base: str | None, reason: str
) -> None:
    folder = tmp_path / "adapter"
    tiny_adapter(folder, tiny_pipeline())
    config = folder / "adapter_config.json"
    stated = {"base_model_name_or_path": base and base.format(folder=folder)}
    config.write_text(json.dumps(json.loads(config.read_text()) | stated))
    with pytest.raises(ModelFormatError if base != "file:/usr/lib" else ModelNotFoundError, match=reason):
        resolve(f"file:{folder}")


def test_triton_reads_the_list_as_a_setting(folders: Path, tmp_path: Path, engine: Engine) -> None:
    repository = tmp_path / "models"
    export = ["triton", "export", "--only", "tango", "--model", f"file:{folders / 'base'}"]
    assert run([*export, "--set", "tango.device=cpu", str(repository)]) == 0

    async def clip() -> np.ndarray[Any, Any]:
        parameters = {"device": "cpu", "threads": "1", "exact": "true", "batch_shapes": "[4]"}
        parameters["adapters"] = json.dumps({"warm": f"file:{folders / 'warm'}"})
        opened = await open_model(repository / "tango" / "1", parameters)
        tensors: Any = {"PROMPT": np.array([PROMPT.encode()], dtype=object), "SEED": np.array([7])}
        tensors["ADAPTER"] = np.array([b"warm"], dtype=object)
        with opened.model.lease() as leased:
            job = leased.read(tensors)
            async with aclosing(leased.run(job, _Patient(), stream=False)) as answers:
                (response,) = [answer async for answer in answers]
        await opened.close()
        audio: np.ndarray[Any, Any] = response.outputs["AUDIO"]
        return audio

    expected = engine.generate(engine.request(PROMPT, seed=7, adapter="warm")).clips[0]
    assert asyncio.run(clip())[0].tobytes() == expected.audio


def test_the_command_takes_any_uri(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    common = ["generate", PROMPT, "--seed", "7", "--steps", "2", "--json", "-o", str(tmp_path / "clip.wav")]
    base, warm = f"file:{folders / 'base'}", f"file:{folders / 'warm'}"
    assert run([*common, "--model", base, "--adapter", warm]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["model"]["name"], record["adapter"]["name"]) == ("base", "warm")
    assert run([*common, "--model", warm]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "warm"
    assert run([*common, "--model", base, "--adapter", "nonsense"]) == 2
    assert "--adapter is 'nonsense'" in capsys.readouterr().err.replace(":", "")
