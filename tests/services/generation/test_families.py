"""A second family through gRPC, the Open Inference Protocol, a switch of models, and Triton's files."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton

from services.api.generation import Clip, Preview, Progress
from services.cli import run
from services.client import AudioClient
from services.engine import Engine, EngineConfig
from services.errors import InvalidInputError, ModelFormatError
from services.generation.settings import GenerationSettings
from services.generation.slot import load_engine
from services.generation.triton import open_model
from services.inference.model import Caller
from services.models.manifest import write_manifest
from services.weights.uri import resolve
from tests.services.generation.serving import Serving, serving, tiny_engine
from tests.services.inference.asking import tensor
from tests.tiny import tiny_tangoflux

PROMPT = "a dog barks then a siren wails"
TOKEN = "of-the-operator"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "flux"
    tiny_tangoflux().save_pretrained(folder)
    write_manifest(folder, name="flux", version="1", license="Apache-2.0")
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """As the service loads it."""
    settings = GenerationSettings(
        model=f"file:{folder}", device="cpu", batch_shapes=(4,), exact=True, threads=1
    )
    with load_engine(settings, resolve(settings.model)) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Serving]:
    with serving(engine, token=TOKEN) as served:
        yield served


def test_grpc(served: Serving, engine: Engine) -> None:
    with AudioClient(served.target, retries=0, timeout=60) as client:
        model = client.get_model()
        assert (model.model.name, model.geometry.latent_channels) == ("flux", 4)
        assert (model.limits.schedulers, model.defaults.scheduler) == (("euler",), "euler")
        made = client.generate(PROMPT, seed=7, duration=0.5, encoding="float32", clip_count=2)
        expected = engine.generate(engine.request(PROMPT, seed=7, duration=0.5, clip_count=2))
        assert [clip.audio for clip in made.clips] == [clip.audio for clip in expected.clips]
        assert made.clips[0].duration == 0.5
        events = list(client.stream(PROMPT, seed=7, preview_interval_steps=2, encoding="float32"))
        kinds = [type(event) for event in events]
        assert (kinds.count(Progress), kinds.count(Preview), kinds.count(Clip)) == (4, 2, 1)
        with pytest.raises(InvalidInputError, match="scheduler: is 'ddim', must be one of euler"):
            client.generate(PROMPT, scheduler="ddim")


def test_the_open_inference_protocol(served: Serving, engine: Engine) -> None:
    inputs = [
        tensor("PROMPT", "BYTES", [PROMPT, "rain falls"]),
        tensor("SEED", "INT64", [7, 8]),
        tensor("NUM_INFERENCE_STEPS", "INT32", [3, 5]),
        tensor("SCHEDULER", "BYTES", ["euler"]),
    ]
    with triton.InferenceServerClient(served.target) as client:
        audio = client.infer("tango", inputs).as_numpy("AUDIO")
        parameters = client.get_model_config("tango", as_json=True)["config"]["parameters"]
    assert parameters["schedulers"]["string_value"] == "euler"
    for row, (prompt, seed, steps) in enumerate(((PROMPT, 7, 3), ("rain falls", 8, 5))):
        request = engine.request(prompt, seed=seed, num_inference_steps=steps)
        assert audio[row].tobytes() == engine.generate(request).clips[0].audio


def test_a_running_service_changes_to_its_own_family_only(folder: Path, tmp_path: Path) -> None:
    settings = GenerationSettings(model=f"file:{folder}", device="cpu", batch_shapes=(1,), threads=1)
    load = partial(load_engine, settings)
    with (
        tiny_engine() as tango,
        serving(tango, token=TOKEN, load=load) as served,
        AudioClient(served.target, retries=0, timeout=60) as client,
    ):
        with pytest.raises(ModelFormatError, match="family TangoFluxPipeline, not TangoPipeline"):
            client.switch_model(f"file:{folder}", token=TOKEN)
        assert client.get_model().model.name == "tiny"
    other = tmp_path / "other"
    tiny_tangoflux(seed=1).save_pretrained(other)
    write_manifest(other, name="other", version="2", license="Apache-2.0")
    with load(resolve(f"file:{folder}")) as flux, serving(flux, token=TOKEN, load=load) as served:
        with AudioClient(served.target, retries=0, timeout=60) as client:
            before = client.generate(PROMPT, seed=7, encoding="float32").clips[0].audio
            assert client.switch_model(f"file:{other}", token=TOKEN).current.name == "other"
            assert client.generate(PROMPT, seed=7, encoding="float32").clips[0].audio != before
        served.run(served.slot.close())


class _Patient:
    """A caller without a deadline."""

    def time_remaining(self) -> float | None:
        return None


def test_exported_for_triton_it_opens_and_generates(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models"
    export = ["triton", "export", "--only", "tango", "--model", f"file:{folder}"]
    assert run([*export, "--set", "tango.device=cpu", str(repository)]) == 0
    assert "tango/1" in capsys.readouterr().out

    async def clip(caller: Caller) -> np.ndarray[Any, Any]:
        opened = await open_model(repository / "tango" / "1", {"device": "cpu", "threads": "1"})
        with opened.model.lease() as leased:
            job = leased.read({"PROMPT": np.array([PROMPT.encode()], dtype=object), "SEED": np.array([7])})
            async with aclosing(leased.run(job, caller, stream=False)) as answers:
                (response,) = [answer async for answer in answers]
        await opened.close()
        audio: np.ndarray[Any, Any] = response.outputs["AUDIO"]
        return audio

    audio = asyncio.run(clip(_Patient()))
    with load_engine(
        GenerationSettings(model=f"file:{folder}", device="cpu", threads=1), resolve(f"file:{folder}")
    ) as engine:
        expected = engine.generate(engine.request(PROMPT, seed=7)).clips[0]
    assert audio[0].tobytes() == expected.audio


def test_the_command_generates(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "clip.wav"
    arguments = ["generate", PROMPT, "--model", f"file:{folder}", "--output", str(output), "--seed", "7"]
    assert run([*arguments, "--steps", "2"]) == 0
    assert output.stat().st_size > 10_000


def test_the_config_of_the_engine_bounds_the_models_limits(folder: Path) -> None:
    config = EngineConfig(threads=1, max_clip_count=2, max_prompt_characters=20)
    with Engine(tiny_tangoflux(), config) as engine:
        assert (engine.limits.max_clip_count, engine.limits.max_prompt_characters) == (2, 20)
        with pytest.raises(InvalidInputError, match=r"prompt: .*\n?.*duration: is 9 s, must be between"):
            engine.generate(engine.request("a dog barks " * 3, duration=9.0))
