"""AudioGenX (arXiv 2502.00459): learn which text tokens each step of a clip needs.

A small network for each step gives the probability p that a text token is needed. Masks drawn from p must
keep the language model's hidden states (factual), their complements must lose them (counterfactual), and p
must be small. The explanation is p, not a drawn mask.

Upstream (hjkng/audiogenX at 3881f1e, ``explain.py``) computes the states with the steps as a batch of
sequences of length one, at position 0: without the history that the target states had. Here a mask [S, L]
goes through one causal pass; upstream's way is available as `history=False`.

Shapes: S predicted steps, K codebooks, L text tokens, W the model's width, H hidden width of a generator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity, pad
from transformers import MusicgenForCausalLM

from services.models.audiogen.masking import masked_attention, masked_states

HIDDEN: Final = 512
"""Width H of upstream's generators."""
ITERATIONS: Final = 50
LEARNING_RATE: Final = 1e-3
WEIGHT_DECAY: Final = 1e-3
SIZE_WEIGHT: Final = 1e-3
"""Weight of the sum of p (upstream's ``beta``)."""
NORM_WEIGHT: Final = 0.1
"""Weight of the square root of the sum of squares of p (upstream's ``gamma``)."""

Tick = Callable[[], None]
"""Called after each iteration; may raise to end them."""


class MaskGenerators(nn.Module):
    """S independent networks in one: Linear(W, H), PReLU, Linear(H, 1), Sigmoid, as batched products."""

    def __init__(
        self, steps: int, width: int, hidden: int = HIDDEN, generator: Generator | None = None
    ) -> None:
        """Initialise as `nn.Linear` and `nn.PReLU` do, with numbers of `generator`."""
        super().__init__()

        def uniform(*shape: int, inputs: int) -> nn.Parameter:
            bound = 1 / math.sqrt(inputs)
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.weight_SWH = uniform(steps, width, hidden, inputs=width)
        self.bias_SH = uniform(steps, hidden, inputs=width)
        self.slope_S = nn.Parameter(torch.full((steps,), 0.25))
        self.output_SH = uniform(steps, hidden, inputs=hidden)
        self.output_bias_S = uniform(steps, inputs=hidden)

    def forward(self, text_LW: Tensor) -> Tensor:
        """Return p [S, L] of projected text tokens."""
        # With the weights in this order no product copies them: they are hundreds of millions.
        text_SLW = text_LW.expand(len(self.weight_SWH), -1, -1)
        hidden_SLH = torch.baddbmm(self.bias_SH[:, None], text_SLW, self.weight_SWH)
        active_SLH = hidden_SLH.where(hidden_SLH > 0, self.slope_S[:, None, None] * hidden_SLH)
        logits_SL1 = torch.baddbmm(self.output_bias_S[:, None, None], active_SLH, self.output_SH[..., None])
        return logits_SL1[..., 0].sigmoid()


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The parts of the loss, and their sum."""

    factual: Tensor
    """Minus the cosines of target states and those under the mask, summed over steps: at least -S."""
    counterfactual: Tensor
    """The cosines of target states and those under the complement, summed over steps."""
    size: Tensor
    """Sum of p."""
    norm: Tensor
    """Square root of the sum of squares of p."""

    @property
    def total(self) -> Tensor:
        """The loss that is minimised."""
        return self.factual + self.counterfactual + SIZE_WEIGHT * self.size + NORM_WEIGHT * self.norm

    def values(self) -> tuple[float, ...]:
        """Return the parts and the sum, in the order of the fields."""
        parts = (self.factual, self.counterfactual, self.size, self.norm, self.total)
        return tuple(float(part.detach()) for part in parts)


def audiogenx_losses(target_SW: Tensor, kept_SW: Tensor, lost_SW: Tensor, p_SL: Tensor) -> Losses:
    """Return the losses of states under masks and under their complements."""
    return Losses(
        factual=-cosine_similarity(target_SW, kept_SW, dim=-1).sum(),
        counterfactual=cosine_similarity(target_SW, lost_SW, dim=-1).sum(),
        size=p_SL.abs().sum(),
        norm=p_SL.square().sum().sqrt(),
    )


def relaxed(p_SL: Tensor, noise_SL2: Tensor) -> Tensor:
    """Return soft samples [S, L] of masks with probabilities p: Gumbel-softmax at temperature 1.

    `noise_SL2` is Gumbel noise of "off" and "on" (arXiv 1611.01144).
    """
    log_odds_SL2 = torch.stack([(1 - p_SL).log(), p_SL.log()], dim=-1)
    return (log_odds_SL2 + noise_SL2).softmax(-1)[..., 1]


def states_under(
    model: MusicgenForCausalLM,
    sequence_KS: Tensor,
    text_LW: Tensor,
    masks: tuple[Tensor, ...],
    *,
    history: bool,
) -> list[Tensor]:
    """Return the states [S, W] of a clip's steps under each of the masks [S, L]. Needs `masked_attention`.

    `history`: one causal pass; otherwise each step alone, at position 0.
    """
    mask_BSL = torch.stack(masks)
    if history:
        sequence_BKS = sequence_KS.expand(len(masks), -1, -1)
        states_BSW = masked_states(model, sequence_BKS, text_LW.expand(len(masks), -1, -1), mask_BSL)
        return list(states_BSW)
    rows_BK1 = sequence_KS.T[:, :, None].repeat(len(masks), 1, 1)
    text_BLW = text_LW.expand(len(rows_BK1), -1, -1)
    states_B1W = masked_states(model, rows_BK1, text_BLW, mask_BSL.flatten(0, 1)[:, None])
    return list(states_B1W[:, 0].chunk(len(masks)))


def make_optimizer(generators: nn.Module) -> torch.optim.Optimizer:
    """Return upstream's Adam, in one kernel: without temporary copies of the parameters."""
    return torch.optim.Adam(generators.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedMask:
    """The result of `learn_mask`."""

    p_SL: Tensor
    """Probability that a step needs a text token."""
    trace: tuple[tuple[float, ...], ...]
    """`Losses.values` before each iteration."""


def learn_mask(
    model: MusicgenForCausalLM,
    sequence_KS: Tensor,
    text_LW: Tensor,
    target_SW: Tensor,
    *,
    generators: MaskGenerators,
    noise: Callable[[int], Tensor],
    iterations: int = ITERATIONS,
    history: bool = True,
    padding: int = 0,
    tick: Tick = lambda: None,
) -> LearnedMask:
    """Train `generators` in place, and return their p.

    Args:
        model: whose parameters take no gradients.
        sequence_KS: input steps of the clip's token sequence.
        text_LW: projected text tokens, without padding.
        target_SW: the states of the unmasked generation.
        generators: as many as steps.
        noise: Gumbel noise [S, L, 2] of an iteration.
        iterations: steps of Adam.
        history: see `states_under`.
        padding: padded tokens after the text, which take attention too.
        tick: called after each iteration.
    """
    read_LW = pad(text_LW, (0, 0, 0, padding))
    optimizer = make_optimizer(generators)
    trace = []
    with torch.enable_grad(), masked_attention(model):
        for iteration in range(iterations):
            p_SL = generators(text_LW)
            mask_SL = relaxed(p_SL, noise(iteration))
            masks = tuple(pad(mask, (0, padding)) for mask in (mask_SL, 1 - mask_SL))
            kept_SW, lost_SW = states_under(model, sequence_KS, read_LW, masks, history=history)
            losses = audiogenx_losses(target_SW, kept_SW, lost_SW, p_SL)
            trace.append(losses.values())
            optimizer.zero_grad()
            losses.total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tick()
        with torch.no_grad():
            return LearnedMask(p_SL=generators(text_LW), trace=tuple(trace))


def gumbel_noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Return Gumbel noise, drawn on the CPU."""
    return -torch.empty(shape).exponential_(generator=generator).log()
