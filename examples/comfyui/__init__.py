"""A node for ComfyUI: a sound effect from a prompt, by a web door of Milonga (docs/http.md).

Copy this folder to ``ComfyUI/custom_nodes/milonga``. It needs nothing that ComfyUI does not have, and
sends the prompt to the address in the node only.
"""

import io
import json
import urllib.error
import urllib.request
import wave
from http.client import HTTPException
from typing import Any, ClassVar

import numpy as np
import torch


class MilongaSoundEffect:
    """Text to audio by ``POST /v1/audio/generate``."""

    CATEGORY = "audio"
    RETURN_TYPES: ClassVar = ("AUDIO", "INT")
    RETURN_NAMES: ClassVar = ("audio", "seed")
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the node's inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "default": "A dog barks then a siren wails"}),
                "seconds": ("FLOAT", {"default": 2.56, "min": 0.1, "max": 600.0, "step": 0.01}),
                "steps": ("INT", {"default": 25, "min": 1, "max": 1000}),
                "guidance": ("FLOAT", {"default": 3.0, "min": 0.0, "max": 20.0, "step": 0.1}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
                "server": ("STRING", {"default": "http://127.0.0.1:8080"}),
            },
            "optional": {
                "negative_prompt": ("STRING", {"default": ""}),
                "token": ("STRING", {"default": ""}),
            },
        }

    def generate(
        self,
        prompt: str,
        seconds: float,
        steps: int,
        guidance: float,
        seed: int,
        server: str,
        negative_prompt: str = "",
        token: str = "",
    ) -> tuple[dict[str, Any], int]:
        """Return the clip as ComfyUI's AUDIO, and its seed. Raises `RuntimeError`, with what is wrong."""
        body = {
            "input": prompt, "audio_length": seconds, "num_inference_steps": steps, "seed": seed,
            "guidance_scale": guidance, "negative_prompt": negative_prompt, "response_format": "wav",
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        address = f"{server.rstrip('/')}/v1/audio/generate"
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"milonga: {_detail(error.read())}") from error
        except (OSError, ValueError, HTTPException) as error:
            raise RuntimeError(
                f"milonga: {server} does not answer HTTP ({str(error)!r}); give the address of a web door as "
                "http://HOST:PORT, and start it: milonga up"
            ) from error
        return _audio(content, server), seed


def _audio(content: bytes, server: str) -> dict[str, Any]:
    try:
        with wave.open(io.BytesIO(content)) as file:
            samples_N = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32767
            return {"waveform": torch.from_numpy(samples_N)[None, None], "sample_rate": file.getframerate()}
    except (wave.Error, EOFError) as error:
        raise RuntimeError(f"milonga: {server} answers no clip; is it a web door of Milonga?") from error


def _detail(content: bytes) -> str:
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")


NODE_CLASS_MAPPINGS = {"MilongaSoundEffect": MilongaSoundEffect}
NODE_DISPLAY_NAME_MAPPINGS = {"MilongaSoundEffect": "Sound effect (Milonga)"}
