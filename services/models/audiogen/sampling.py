"""Sample audio tokens: the part that a scheduler plays for a diffusion model.

A step of the engine predicts one step of the token sequence. The "latents" of a clip are the sequence
itself, as float32 [1, K, S] (exact for tokens), and the output of the model are logits [1, K, V].

Shapes: B clips, K codebooks, S steps, V codes.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor

from services.models.audiogen.pattern import is_code
from services.models.latent import Solver

SAMPLE: Final = "sample"
GREEDY: Final = "greedy"
SCHEDULERS: Final = (SAMPLE, GREEDY)
"""Names of the ways to choose a token: drawn from the most probable ones, or the most probable one."""


class TokenScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Draws the next step's tokens of guided logits."""

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, top_k: int = 250, temperature: float = 1.0, special: int = 2048) -> None:
        """Draw among the `top_k` most probable tokens; `special` fills the pattern's corners."""
        self.timesteps = torch.arange(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Take so many steps: all of a sequence but the first, which is given."""
        self.timesteps = torch.arange(num_inference_steps, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the sequences [B, K, S] with the tokens after step `timestep`, drawn of logits [B, K, V].

        The noise is Gumbel's, one draw a codebook and step: with the same seed, sequences of similar logits
        have the same tokens. Logits that are not finite make the tokens not finite.
        """
        at = int(timestep) + 1
        codebooks, steps = sample.shape[1:]
        logits_BKV = model_output.float() / self.config.temperature
        most = min(self.config.top_k, logits_BKV.shape[-1])
        least_BK1 = logits_BKV.topk(most).values[..., -1:]
        noise_BKV = _gumbel(logits_BKV, generator)
        tokens_BK = (logits_BKV + noise_BKV).masked_fill(logits_BKV < least_BK1, -torch.inf).argmax(-1)
        held_K = is_code(steps, codebooks, sample.device)[:, at]
        drawn_BK = torch.where(held_K, tokens_BK, self.config.special).to(sample.dtype)
        finite_BK = logits_BKV.isfinite().all(-1)
        following = sample.clone()
        following[:, :, at] = torch.where(finite_BK, drawn_BK, torch.nan)
        return (following,)


class TokenSolver(Solver):
    """Chooses the tokens of one clip."""

    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return the sequence so far."""
        return latents


def _gumbel(like_BKV: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Return Gumbel noise, drawn on the generator's device; a sequence has a generator a clip."""
    if isinstance(generator, Sequence):
        return torch.cat([_gumbel(row[None], one) for row, one in zip(like_BKV, generator, strict=True)])
    device = like_BKV.device if generator is None else generator.device
    noise = torch.empty(like_BKV.shape, device=device).exponential_(generator=generator)
    return -noise.log().to(like_BKV.device)
