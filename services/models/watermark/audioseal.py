"""AudioSeal (arXiv 2401.17264), by the package `audioseal` and checkpoints on disk: the extra `watermark`.

Checkpoints are the released ``generator_base.pth`` and ``detector_base.pth`` (facebook/audioseal, 16 bits,
16 kHz). They are pickles: here their tensors are read, and nothing in them runs. The package would unpickle
them whole, and download what is missing.

Shape legend: B batch, N samples, M bits of the message.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from services.audio.resampling import resample
from services.errors import ModelFormatError, UnsupportedError
from services.models.foreign_pickle import read_foreign_pickle
from services.models.watermark import BITS, Detection, Waveform

RATE: Final = 16_000
"""Sampling rate of the models in hertz. Clips of other rates are resampled for them."""
_GENERATOR, _DETECTOR = "audioseal_wm_16bits", "audioseal_detector_16bits"
"""Cards of the package: the settings of the released models."""


class AudioSealWatermark:
    """Embeds messages. Takes some tenths of a second of one core per second of sound."""

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        """Load ``generator_base.pth``.

        Raises:
            ModelFormatError: the file is none, or of another architecture.
            UnsupportedError: the package is not installed.
        """
        self._model, self._device = load_generator(checkpoint).to(device), device

    @torch.inference_mode()
    def embed(self, waveform_N: Waveform, sampling_rate: int, message: int) -> Waveform:
        """See `Watermark`. At another rate than 16 kHz the watermark is resampled, not the clip."""
        bits_M = torch.tensor([message >> place & 1 for place in range(BITS)], device=self._device)
        at_RATE_N = resample(waveform_N, sampling_rate, RATE)
        clip_B1N = torch.from_numpy(np.ascontiguousarray(at_RATE_N))[None, None].to(self._device)
        mark_N = self._model.get_watermark(clip_B1N, message=bits_M[None])[0, 0].cpu().numpy()
        mark_N = resample(mark_N, RATE, sampling_rate)[: len(waveform_N)]
        marked_N = waveform_N.copy()
        marked_N[: len(mark_N)] += mark_N
        return np.clip(marked_N, -1.0, 1.0)


class AudioSealDetector:
    """Detects messages."""

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        """Load ``detector_base.pth``. Raises as `AudioSealWatermark`."""
        self._model, self._device = load_detector(checkpoint).to(device), device

    @torch.inference_mode()
    def detect(self, waveform_N: Waveform, sampling_rate: int) -> Detection:
        """See `WatermarkDetector`."""
        clip_N = np.ascontiguousarray(resample(waveform_N, sampling_rate, RATE), np.float32)
        share_B, bits_BM = self._model.detect_watermark(torch.from_numpy(clip_N)[None, None].to(self._device))
        message = sum(int(bit) << place for place, bit in enumerate(bits_BM[0].tolist()))
        return Detection(share=float(share_B[0]), message=message)


def load_generator(checkpoint: Path | None) -> Any:
    """Return AudioSeal's generator; with random weights without a checkpoint. Raises as the classes."""
    _require_package()
    from audioseal.builder import AudioSealWMConfig, create_generator

    return _load(create_generator(_settings(_GENERATOR, AudioSealWMConfig)), checkpoint)


def load_detector(checkpoint: Path | None) -> Any:
    """Return AudioSeal's detector; with random weights without a checkpoint. Raises as the classes."""
    _require_package()
    from audioseal.builder import AudioSealDetectorConfig, create_detector

    return _load(create_detector(_settings(_DETECTOR, AudioSealDetectorConfig)), checkpoint)


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in which weight normalisation, w = g v / ‖v‖, is applied, under the modules' names.

    Released files have ``conv.weight_g`` and ``conv.weight_v``; today's modules ``conv.inner_conv.weight``.
    """
    from audioseal.loader import convert_state_dict_for_scriptable_model

    renamed: dict[str, Tensor] = convert_state_dict_for_scriptable_model(dict(weights))
    found: dict[str, Tensor] = {}
    for key, value in renamed.items():
        for g, v in (
            (".weight_g", ".weight_v"),
            (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
        ):
            if key.endswith(g):
                stem = key.removesuffix(g)
                direction = renamed[stem + v]
                norm = direction.flatten(1).norm(dim=1).reshape(value.shape)
                found[f"{stem}.weight"] = value * direction / norm
                break
            if key.endswith(v):
                break
        else:
            found[key] = value
    return found


def _require_package() -> None:
    if find_spec("audioseal") is None:
        raise UnsupportedError("audioseal is not installed; pip install 'milonga[watermark]'")
    # Otherwise the first clip waits minutes for a compiler.
    os.environ.setdefault("NO_TORCH_COMPILE", "1")


def _settings(card: str, kind: type[Any]) -> Any:
    from audioseal.loader import AudioSeal, load_local_model_config
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(load_local_model_config(card))
    return AudioSeal.parse_config(config, config_type=kind)


def _load(model: nn.Module, checkpoint: Path | None) -> nn.Module:
    if checkpoint is not None:
        content = read_foreign_pickle(checkpoint)
        if isinstance(content, Mapping) and "best_state" in content:
            content = content["best_state"]
        if isinstance(content, Mapping) and "model" in content:
            content = content["model"]
        if not isinstance(content, Mapping) or not all(isinstance(one, Tensor) for one in content.values()):
            raise ModelFormatError(
                f"{checkpoint} holds no weights of AudioSeal; give generator_base.pth or "
                "detector_base.pth of facebook/audioseal"
            )
        try:
            model.load_state_dict(merged(content))
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelFormatError(f"{checkpoint} is of another model than AudioSeal's: {reason}") from error
    return model.eval()
