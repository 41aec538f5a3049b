"""Adapters by request: each clip as the merged model makes it, whatever adapters others use."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.api.generation import Clip, Finished, GenerationRequest
from services.engine import Engine, EngineConfig
from services.errors import InvalidInputError
from services.models.lora import ADAPTER_WEIGHTS
from services.models.manifest import ADAPTER_CONFIG
from services.models.tango.pipeline import TangoPipeline
from services.weights.adapter_sources import AdapterSources
from services.weights.adapters import AdapterStore
from tests.services.engine.test_engine import together
from tests.services.engine.watching import denoiser_calls
from tests.tiny import tiny_adapter, tiny_audiogen, tiny_pipeline, tiny_tangoflux

ONE = EngineConfig(threads=1)
EXACT = EngineConfig(threads=1, exact=True)
RANKS = {"a": 4, "b": 1, "c": 16}


@pytest.fixture(scope="module")
def folders(pipeline: TangoPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        tiny_adapter(root / name, pipeline, seed=seed, rank=rank)
    return {name: root / name for name in RANKS}


def store_of(pipeline: Any, folders: Mapping[str, Path], max_bytes: int = 2**30) -> AdapterStore:
    listed = {name: f"file:{folder}" for name, folder in folders.items()}
    return AdapterStore(pipeline, AdapterSources(listed=listed, max_bytes=max_bytes))


def clip_of(engine: Engine, request: GenerationRequest) -> Clip:
    return engine.generate(request).clips[0]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_tangoflux])
def test_a_clip_equals_that_of_the_merged_model(
    make: Callable[[], Any], guidance_scale: float, tmp_path: Path
) -> None:
    pipeline = make()
    merged = copy(pipeline)
    part = "unet" if isinstance(pipeline, TangoPipeline) else "transformer"
    setattr(
        merged, part, tiny_adapter(tmp_path / "x", pipeline, targets=("to_q", "to_k", "to_v", "to_out.0"))
    )
    options: Any = {"seed": 5, "num_inference_steps": 6, "guidance_scale": guidance_scale}
    with Engine(merged, ONE) as engine:
        expected = clip_of(engine, engine.request("a dog barks", **options))
    with Engine(pipeline, ONE, adapters=store_of(pipeline, {"x": tmp_path / "x"})) as engine:
        bare = clip_of(engine, engine.request("a dog barks", **options))
        generation = engine.generate(engine.request("a dog barks", adapter="x", **options))
    found = generation.clips[0].waveform()
    assert generation.adapter is not None and generation.adapter.name == "x"
    effect = np.abs(bare.waveform() - expected.waveform()).max()
    assert effect > 1e-4
    assert np.abs(found - expected.waveform()).max() < 1e-3 * effect


def test_adapters_share_a_call_and_companions_change_no_bit(
    pipeline: TangoPipeline, folders: dict[str, Path]
) -> None:
    with (
        denoiser_calls(pipeline) as calls,
        Engine(pipeline, EXACT, adapters=store_of(pipeline, folders)) as engine,
    ):
        requests = [
            engine.request(
                "a dog barks", seed=seed, num_inference_steps=4, guidance_scale=scale, adapter=name
            )
            for seed, (name, scale) in enumerate((("a", 3.0), ("", 1.0), ("b", 1.0), ("c", 3.0), ("a", 2.0)))
        ]
        alone = [clip_of(engine, request) for request in requests]
        calls.clear()
        at_once = [watch.clips()[0] for watch in together(engine, requests)]
    assert len(calls) < 4 * len(requests), "they shared calls"
    for one, other in zip(alone, at_once, strict=True):
        assert one.audio == other.audio
    with Engine(pipeline, EXACT) as engine:
        assert clip_of(engine, replace(requests[1], adapter="")).audio == alone[1].audio


def test_a_denoiser_is_left_as_it_was(pipeline: TangoPipeline, folders: dict[str, Path]) -> None:
    with Engine(pipeline, ONE, adapters=store_of(pipeline, folders)) as engine:
        request = engine.request("a dog barks", seed=1, num_inference_steps=3)
        before = clip_of(engine, request)
        clip_of(engine, replace(request, adapter="a"))
        assert clip_of(engine, request).audio == before.audio
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


def test_the_least_recently_used_is_dropped(pipeline: TangoPipeline, folders: dict[str, Path]) -> None:
    sizes = {name: store_of(pipeline, folders).get(name).size for name in RANKS}
    store = store_of(pipeline, folders, max_bytes=sizes["a"] + sizes["b"])
    a, b = store.get("a"), store.get("b")
    assert store.get("a") is a and store.get("b") is b
    small = store_of(pipeline, folders, max_bytes=sizes["c"])
    first = small.get("a")
    small.get("c")
    assert small.size == sizes["c"]
    assert small.get("a") is not first
    with pytest.raises(InvalidInputError, match=r"adapter: is 'c': .* raise adapter_memory_mib"):
        store_of(pipeline, folders, max_bytes=sizes["a"]).get("c")


def test_running_requests_keep_their_adapter(pipeline: TangoPipeline, folders: dict[str, Path]) -> None:
    store = store_of(pipeline, folders)
    with Engine(pipeline, ONE, adapters=store) as engine:
        expected = clip_of(engine, engine.request("a dog", seed=2, num_inference_steps=6, adapter="a"))
    small = store_of(pipeline, folders, max_bytes=max(store.get(name).size for name in RANKS))
    with Engine(pipeline, ONE, adapters=small) as engine:
        events = engine.stream(engine.request("a dog", seed=2, num_inference_steps=6, adapter="a"))
        small.get("c")
        found = [event for event in events if isinstance(event, Clip | Finished)]
    assert isinstance(found[0], Clip)
    np.testing.assert_allclose(found[0].waveform(), expected.waveform(), atol=1e-6)


def test_what_is_no_adapter_of_the_model_is_refused(
    pipeline: TangoPipeline, folders: dict[str, Path], tmp_path: Path
) -> None:
    flux = tiny_tangoflux()
    tiny_adapter(tmp_path / "flux", flux)
    tiny_adapter(tmp_path / "conv", pipeline, targets=("conv_in",))
    tiny_adapter(tmp_path / "half", pipeline)
    weights = load_file(tmp_path / "half" / ADAPTER_WEIGHTS)
    save_file(
        {key: value for key, value in weights.items() if "lora_A" in key}, tmp_path / "half" / ADAPTER_WEIGHTS
    )
    tiny_adapter(tmp_path / "nan", pipeline)
    first = next(iter(weights))
    save_file(
        {**weights, first: torch.full_like(weights[first], torch.nan)}, tmp_path / "nan" / ADAPTER_WEIGHTS
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    names = ("flux", "conv", "half", "nan", "model", "gone")
    store = store_of(pipeline, {**folders, **{name: tmp_path / name for name in names}})
    reasons = {
        "flux": "of another architecture: .*; use it with the model that it was trained from, or train one",
        "conv": "no product of a linear layer; train the adapter with linear layers only",
        "half": "has one matrix of two",
        "nan": "NaN or infinity",
        "model": f"is no adapter: it has no {ADAPTER_CONFIG}",
        "gone": "is no folder",
        "unlisted": "is 'unlisted', must be one of a, b, c, flux",
        "name@7": "is 'name@7', must be one of",
    }
    with Engine(pipeline, ONE, adapters=store) as engine:
        assert engine.limits.adapters == (*RANKS, *names)
        for name, reason in reasons.items():
            with pytest.raises(InvalidInputError, match=f"adapter: .*{reason}"):
                engine.generate(engine.request("a dog", adapter=name))
        with pytest.raises(InvalidInputError, match="printable characters"):
            engine.generate(engine.request("a dog", adapter="a\nb"))
    with Engine(pipeline, ONE) as engine, pytest.raises(InvalidInputError, match="takes no adapters"):
        engine.generate(engine.request("a dog", adapter="a"))
    audiogen = tiny_audiogen()
    with (
        Engine(audiogen, ONE, adapters=store_of(audiogen, folders)) as engine,
        pytest.raises(InvalidInputError, match=r"\(AudioGenPipeline\) takes no adapters"),
    ):
        engine.generate(engine.request("a dog", adapter="a"))
