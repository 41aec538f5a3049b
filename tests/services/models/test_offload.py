"""Parts that are kept in main memory, and copied to the device layer by layer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from services.engine import Engine, EngineConfig
from services.models.architectures import architecture_of, load_generator
from tests.tiny import tiny_audiogen, tiny_pipeline, tiny_tangoflux

PROMPT = "a dog barks"
FAMILIES = {
    "tango": tiny_pipeline,
    "tango with a neural vocoder": partial(tiny_pipeline, vocoder="hifigan"),
    "tangoflux": tiny_tangoflux,
    "audiogen": tiny_audiogen,
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_offloaded_model_makes_the_same_clips(family: Callable[[], Any], tmp_path: Path) -> None:
    family().save_pretrained(tmp_path)
    clips = []
    for offload in (False, True):
        pipeline: Any = load_generator(tmp_path, offload=offload)
        with Engine(pipeline, EngineConfig(threads=1)) as engine:
            for _ in range(2):
                request = engine.request(PROMPT, seed=3, num_inference_steps=2)
                clips.append(engine.generate(request).clips[0].waveform())
    assert all(np.array_equal(clip, clips[0]) for clip in clips)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    with_weights = {name for name, part in parts.items() if list(part.parameters())}
    offloaded = {name for name, part in parts.items() if any(one.is_meta for one in part.parameters())}
    assert offloaded == with_weights & set(architecture_of(tmp_path).offloadable)
    assert pipeline.device.type == "cpu"
