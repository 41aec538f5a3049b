"""EAT, the audio encoder (arXiv 2401.03497): log-mel spectrograms to tokens.

Source of the arithmetic: cwx-worst-one/EAT at 06c1c34, as SLAM-LLM a68e78f calls it. Post-norm blocks, the
class token kept, no final norm.

Shapes: B batch, T mel frames, M mel bins, P patches, L tokens (1 + P), D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.errors import ModelFormatError
from services.models.captioner.config import PATCH


@dataclass(frozen=True, kw_only=True, slots=True)
class EatConfig:
    """Sizes of the encoder; the defaults are EAT-base's."""

    width: int = 768
    """Width D of a token; a multiple of 4 and of `heads`."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads."""
    mlp_ratio: int = 4
    """Width of a block's feed-forward network, in multiples of `width`."""
    mel_bins: int = 128
    """Mel bins M of a spectrogram; a multiple of 16."""
    max_steps: int = 768
    """Most patches along time: positions are stored for so many."""
    eps: float = 1e-6
    """Epsilon of every layer norm."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_ratio", "mel_bins", "max_steps"):
            if getattr(self, name) < 1:
                raise ModelFormatError(f"encoder {name} is {getattr(self, name)}; it must be 1 or more")
        if self.width % 4 or self.width % self.heads:
            raise ModelFormatError(
                f"encoder width ({self.width}) must be a multiple of 4 and of heads ({self.heads})"
            )
        if self.mel_bins % PATCH:
            raise ModelFormatError(f"encoder mel_bins is {self.mel_bins}; it must be a multiple of {PATCH}")

    @property
    def bands(self) -> int:
        """Return the number of patches along the mel axis."""
        return self.mel_bins // PATCH

    @property
    def max_frames(self) -> int:
        """Return the longest spectrogram."""
        return self.max_steps * PATCH


class EatEncoder(nn.Module):
    """Spectrograms [B, T, M] to tokens [B, 1 + T / 16 × M / 16, D], the class token first."""

    positions: Tensor

    def __init__(self, config: EatConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        # Saved, since a checkpoint brings its own.
        self.register_buffer("positions", sincos_positions(config.max_steps, config.bands, width)[None])
        self.pre_norm = nn.LayerNorm(width, eps=config.eps)
        self.blocks = nn.ModuleList(EatBlock(config) for _ in range(config.depth))

    def embed(self, mels_BTM: Tensor) -> Tensor:
        """Return the patches [B, P, D] without positions: time step by time step, its mel bands in order."""
        patches_BPD: Tensor = self.patches(mels_BTM[:, None]).flatten(2).transpose(1, 2)
        return patches_BPD

    def place(self, patches_BPD: Tensor) -> Tensor:
        """Return patches with positions, after the class token, which has none, normalised: [B, L, D]."""
        placed_BPD = patches_BPD + self.positions[:, : patches_BPD.shape[1]]
        first_B1D = self.class_token.expand(len(placed_BPD), -1, -1)
        tokens_BLD: Tensor = self.pre_norm(torch.cat([first_B1D, placed_BPD], dim=1))
        return tokens_BLD

    def forward(self, mels_BTM: Tensor) -> Tensor:
        """Return the tokens of the last block [B, L, D]. T must be a multiple of 16."""
        tokens_BLD = self.place(self.embed(mels_BTM))
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD)
        return tokens_BLD


class EatBlock(nn.Module):
    """A transformer block that normalises after each residual (post-norm)."""

    def __init__(self, config: EatConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=config.eps)
        self.attn = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, eps=config.eps)
        self.mlp = Mlp(width, config.mlp_ratio * width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Return the tokens after attention and feed-forward [B, L, D]."""
        tokens_BLD = self.norm1(tokens_BLD + self.attn(tokens_BLD))
        output_BLD: Tensor = self.norm2(tokens_BLD + self.mlp(tokens_BLD))
        return output_BLD


class Attention(nn.Module):
    """Self-attention over all tokens, without a mask: padding is part of the spectrogram."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Return the attended tokens [B, L, D]."""
        qkv = self.qkv(tokens_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        output_BLD: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return output_BLD


class Mlp(nn.Module):
    """Feed-forward network with an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Return the transformed tokens [B, L, D]."""
        output_BLD: Tensor = self.fc2(nn.functional.gelu(self.fc1(tokens_BLD)))
        return output_BLD


def sincos_positions(steps: int, bands: int, width: int) -> Tensor:
    """Return fixed positions [steps × bands, width], time-major: the mel axis in the first half of the width,
    time in the second (MAE's `get_2d_sincos_pos_embed`, whose grid has its second axis first).
    """
    step_P = torch.arange(steps, dtype=torch.float64).repeat_interleave(bands)
    band_P = torch.arange(bands, dtype=torch.float64).repeat(steps)
    return torch.cat([_sincos(band_P, width // 2), _sincos(step_P, width // 2)], dim=1).float()


def _sincos(places_P: Tensor, width: int) -> Tensor:
    omega = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = places_P[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)
