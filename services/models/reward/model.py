"""The reward model: predict how much a listener would like a clip for its prompt.

A small transformer over the tokens of a frozen CLAP model. Text tokens attend to audio tokens, so that the
model sees the order of events, which CLAP's pooled embeddings lose.

::

    model = load_reward(mini_folder("reward"), load_clap(mini_folder("clap-a")), clap_digest)
    model.reward(["A dog barks then a siren wails"], [model.prepare(waveform, 16_000)])   # tensor([2.1])

Shapes: B batch, L text tokens, A audio tokens, C width of CLAP's tokens, D the head's width.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.errors import DigestMismatchError, ModelFormatError
from services.models.clap.model import AudioTokens, ClapModel, TextTokens, Waveform
from services.models.folders import build_dataclass, read_json, read_layout
from services.models.state_dicts import check_finite, check_weights, on_meta

CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "model.safetensors"
MODEL_TYPE: Final = "milonga-reward"

PERIODS: Final = (0.25, 120.0)
"""Shortest and longest period, in seconds, of the sines that encode a token's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Sizes of the head, and the identity of the CLAP model that it was trained on."""

    text_width: int
    """Width C of CLAP's text tokens."""
    audio_width: int
    """Width C of CLAP's audio tokens."""
    clap_name: str
    """Name of the CLAP model, for messages."""
    clap_digest: str
    """`sha256:` and the digest over every file of the CLAP model; no other is accepted."""
    width: int = 96
    """Width D of the head's tokens."""
    heads: int = 4
    """Attention heads."""
    layers: int = 2
    """Layers of self-attention and cross-attention of the text tokens."""
    feedforward: int = 192
    """Width of the layers' feed-forward networks."""
    dropout: float = 0.1
    """Dropout in training."""
    temperature: float = 1.0
    """Divisor of raw logits (temperature scaling, arXiv 1706.04599); above 1 for an overconfident head."""
    bias: float = 0.0
    """Added to the divided logits (Platt scaling); below 0 for a head that likes wrong clips."""

    def __post_init__(self) -> None:
        for name in ("text_width", "audio_width", "width", "heads", "layers", "feedforward"):
            if getattr(self, name) < 1:
                raise ModelFormatError(f"reward {name} is {getattr(self, name)}; it must be 1 or more")
        if self.width % (2 * self.heads):
            raise ModelFormatError(
                f"reward width ({self.width}) must be a multiple of 2 × heads ({self.heads})"
            )
        if not 0 <= self.dropout < 1:
            raise ModelFormatError(f"reward dropout is {self.dropout}; it must be at least 0 and below 1")
        if not 0 < self.temperature < math.inf:
            raise ModelFormatError(f"reward temperature is {self.temperature}; it must be above 0")
        if not math.isfinite(self.bias):
            raise ModelFormatError(f"reward bias is {self.bias}; it must be a finite number")


class RewardHead(nn.Module):
    """Maps CLAP's tokens of a prompt and a clip to a logit."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        width = config.width
        sizes: dict[str, Any] = {
            "d_model": width,
            "nhead": config.heads,
            "dim_feedforward": config.feedforward,
            "dropout": config.dropout,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.width = width
        self.text_in = nn.Sequential(nn.LayerNorm(config.text_width), nn.Linear(config.text_width, width))
        self.audio_in = nn.Sequential(nn.LayerNorm(config.audio_width), nn.Linear(config.audio_width, width))
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Embedding(128, width)
        self.audio_layer = nn.TransformerEncoderLayer(**sizes)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(**sizes) for _ in range(config.layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, text: TextTokens, audio: AudioTokens) -> Tensor:
        """Return raw logits [B], which are not calibrated."""
        audio_BAD = self.audio_in(audio.hidden_BAC) + time_features(audio.seconds_BA, self.width)
        silent_BA = ~audio.mask_BA
        audio_BAD = self.audio_layer(audio_BAD, src_key_padding_mask=silent_BA)
        places = torch.arange(text.mask_BL.shape[1], device=text.mask_BL.device).clamp(
            max=self.positions.num_embeddings - 1
        )
        words_BLD = self.text_in(text.hidden_BLC) + self.positions(places)
        batch = len(words_BLD)
        words_BLD = torch.cat([self.query.expand(batch, -1, -1), words_BLD], dim=1)
        empty_BL = nn.functional.pad(~text.mask_BL, (1, 0))
        for layer in self.layers:
            words_BLD = layer(
                words_BLD, audio_BAD, tgt_key_padding_mask=empty_BL, memory_key_padding_mask=silent_BA
            )
        logits_B: Tensor = self.out(words_BLD[:, 0])[:, 0]
        return logits_B


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardClip:
    """A clip prepared for the model."""

    windows_WS: Tensor
    """CLAP's windows, float32 on the CPU."""
    seconds: float
    """Length of the clip in seconds."""


class RewardModel(nn.Module):
    """A head on a frozen CLAP model. `reward` returns calibrated logits; their sigmoid is a probability."""

    def __init__(self, clap: ClapModel, config: RewardConfig) -> None:
        """Args:
        clap: the CLAP model with the digest in `config`.
        config: sizes; the token widths must be `clap`'s.
        """
        super().__init__()
        for name in ("text_width", "audio_width"):
            if getattr(config, name) != getattr(clap, name):
                raise ModelFormatError(
                    f"this reward model reads CLAP tokens of {name} {getattr(config, name)}, "
                    f"but this CLAP model's have {getattr(clap, name)}"
                )
        self.config = config
        self.head = RewardHead(config)
        self.clap = clap.requires_grad_(False)

    def prepare(self, waveform: Waveform, sampling_rate: int) -> RewardClip:
        """Cut a clip into CLAP's windows. A short clip is padded with silence, since repeating it loses
        order.

        Arguments and limits are those of `ClapModel.prepare`.
        """
        windows = self.clap.prepare(waveform, sampling_rate, padding="pad")
        return RewardClip(windows_WS=windows, seconds=waveform.shape[-1] / sampling_rate)

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`: sentences that begin with ``prompt``."""
        return self.clap.prompt_warnings(prompt)

    def reads(self, prompt: str) -> bool:
        """Return whether the model knows a word for a sound in `prompt`; else its reward means nothing."""
        return self.clap.reads(prompt)

    def window_count(self, seconds: float) -> int:
        """Return the number of windows that cover a clip of `seconds`: its cost."""
        return self.clap.window_count(seconds)

    def audio_tokens(self, clips: Sequence[RewardClip]) -> AudioTokens:
        """Return CLAP's tokens of the clips, without gradients."""
        return self.clap.audio_tokens([clip.windows_WS for clip in clips], [clip.seconds for clip in clips])

    @torch.inference_mode()
    def reward(self, prompts: Sequence[str], clips: Sequence[RewardClip]) -> Tensor:
        """Return the rewards of prompts and their clips: calibrated logits, float32 [B], on the CPU."""
        raw_B = self.head(self.clap.text_tokens(prompts), self.audio_tokens(clips))
        return self.calibrate(raw_B.float().cpu())

    def calibrate(self, raw_B: Tensor) -> Tensor:
        """Return the rewards of raw logits."""
        return raw_B / self.config.temperature + self.config.bias

    def calibrated(self, temperature: float, bias: float = 0.0) -> "RewardModel":
        """Return this model with another calibration; it shares the weights."""
        model = RewardModel(self.clap, replace(self.config, temperature=temperature, bias=bias))
        model.head = self.head
        return model.train(self.training)

    def save(self, folder: Path) -> None:
        """Write the head (safetensors) and its config into `folder`; CLAP's weights are not copied."""
        save_head(self.head, self.config, folder)


def save_head(head: RewardHead, config: RewardConfig, folder: Path) -> None:
    """Write a head's weights, in their own precision, and its config into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps({"model_type": MODEL_TYPE, **asdict(config)}, indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def time_features(seconds_BA: Tensor, width: int) -> Tensor:
    """Return sines and cosines of the times [B, A, width], with log-spaced periods over `PERIODS`."""
    shortest, longest = (math.log(period) for period in PERIODS)
    periods = torch.linspace(shortest, longest, width // 2, device=seconds_BA.device).exp()
    angles_BAD = 2 * math.pi * seconds_BA[..., None] / periods
    return torch.cat([angles_BAD.sin(), angles_BAD.cos()], dim=-1)


def read_reward_config(folder: Path) -> RewardConfig:
    """Return the config in `folder`. Raises `ModelFormatError` unless it is that of a reward model."""
    data = read_json(folder / CONFIG_NAME)
    if data.pop("model_type", None) != MODEL_TYPE:
        raise ModelFormatError(
            f"{folder} holds no reward model; give a folder that `milonga train reward` wrote"
        )
    return build_dataclass(RewardConfig, data, folder / CONFIG_NAME)


def load_reward(folder: Path, clap: ClapModel, clap_digest: str) -> RewardModel:
    """Load the reward model in `folder` for inference with `clap`, on its device, in float32.

    Raises:
        ModelFormatError: the folder holds no reward model.
        DigestMismatchError: it was trained on another CLAP model than that of `clap_digest`.
    """
    config = read_reward_config(folder)
    if config.clap_digest != clap_digest:
        raise DigestMismatchError(
            f"{folder} was trained on the CLAP model {config.clap_name} ({config.clap_digest}), but this is "
            f"{clap_digest}; give the one it was trained on"
        )
    check_weights(str(folder), on_meta(lambda: RewardHead(config)), read_layout(folder))
    model = RewardModel(clap, config)
    weights = load_file(folder / WEIGHTS_NAME)
    check_finite(str(folder), weights)
    model.head.load_state_dict({key: value.float() for key, value in weights.items()})
    return model.to(clap.device).eval().requires_grad_(False)
