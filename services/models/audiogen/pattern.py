"""The delay pattern: codebook k lags k steps behind the first (arXiv 2306.05284, section 2.2).

A clip of T frames takes S = T + K steps. Step 0 holds the special token in all codebooks; frame t of
codebook k is at step t + k + 1. The rest of the corners holds the special token too.

Shapes: B clips, K codebooks, T frames, S steps.
"""

import torch
from torch import Tensor


def steps_of(frames: int, codebooks: int) -> int:
    """Return S, the steps of a sequence, of which all but the first are predicted."""
    return frames + codebooks


def delayed(codes_BKT: Tensor, special: int) -> Tensor:
    """Return the sequence [B, K, S] of codes."""
    clips, codebooks, frames = codes_BKT.shape
    sequence_BKS = codes_BKT.new_full((clips, codebooks, steps_of(frames, codebooks)), special)
    for k in range(codebooks):
        sequence_BKS[:, k, k + 1 : k + 1 + frames] = codes_BKT[:, k]
    return sequence_BKS


def undelayed(sequence_BKS: Tensor) -> Tensor:
    """Return the codes [B, K, T] of a sequence: the inverse of `delayed`."""
    codebooks, steps = sequence_BKS.shape[1:]
    frames = steps - codebooks
    return torch.stack([sequence_BKS[:, k, k + 1 : k + 1 + frames] for k in range(codebooks)], dim=1)


def is_code(steps: int, codebooks: int, device: torch.device | None = None) -> Tensor:
    """Return which places of a sequence hold a frame's code and not the special token: bool [K, S]."""
    step_S = torch.arange(steps, device=device)[None]
    k_K = torch.arange(codebooks, device=device)[:, None]
    return (step_S > k_K) & (step_S < steps - codebooks + 1 + k_K)
