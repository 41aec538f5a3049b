"""ComfyUI's node, against a web door. ComfyUI itself is not run."""

import pytest
import torch

from examples.comfyui import NODE_CLASS_MAPPINGS

PROMPT = "a dog barks"


def test_the_node_returns_comfyuis_audio(door: str) -> None:
    node = NODE_CLASS_MAPPINGS["MilongaSoundEffect"]()
    inputs = node.INPUT_TYPES()["required"]
    assert set(inputs) == {"prompt", "seconds", "steps", "guidance", "seed", "server"}
    audio, seed = node.generate(PROMPT, 0.64, 1, 3.0, 7, door)
    assert (audio["sample_rate"], seed) == (16_000, 7)
    assert audio["waveform"].shape == (1, 1, round(0.64 * 16_000))
    assert audio["waveform"].dtype == torch.float32


def test_the_node_says_what_is_wrong(door: str) -> None:
    node = NODE_CLASS_MAPPINGS["MilongaSoundEffect"]()
    with pytest.raises(RuntimeError, match="audio_length: is 99 s"):
        node.generate(PROMPT, 99, 1, 3.0, 7, door)
    with pytest.raises(RuntimeError, match="does not answer"):
        node.generate(PROMPT, 1, 1, 3.0, 7, "http://127.0.0.1:1")
