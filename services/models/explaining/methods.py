"""The three methods of attribution, word by frame, for a latent-diffusion model.

Each is a function of tensors: latents at some timesteps, and the encoded prompt. None keeps anything, and the
denoiser is as before at the end.

* `occlusion` (the reference): how much the denoiser's output changes, on the same latents, if a word is
  masked in the cross-attention. The word is not deleted, since that would shift the other tokens.
* `attention`: how much the frames attend to the word (DAAM, arXiv 2210.04885, carried to audio).
* `learned_mask`: AudioGenX (arXiv 2502.00459), carried to diffusion: a mask on the cross-attention's weights
  that keeps the output (factual), whose complement loses what the text adds (counterfactual).

Shapes: S points of a trajectory, X the family's shape of latents, W words, L text tokens, T latent frames,
F latent mel bins, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from services.errors import UnsupportedError
from services.models.explaining.cross_attention import edited
from services.models.latent import Conditioning

MAX_ROWS: Final = 32
"""Most rows of a call of the denoiser."""

Tick = Callable[[], None]
"""Called after each call of the denoiser; what it raises ends the method."""


class Denoise(Protocol):
    """A call of the denoiser: latents [B, X], timesteps [B], the text, seconds [B] to its output [B, X]."""

    def __call__(
        self, latents_BX: Tensor, timesteps_B: Tensor, conditioning: Conditioning, seconds_B: Tensor, /
    ) -> Tensor:
        """Return the output in float32, with gradients if they are enabled."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Points:
    """Latents at which the denoiser is asked."""

    latents_SX: Tensor
    timesteps_S: Tensor
    seconds: float
    """Duration of the clip."""

    def __len__(self) -> int:
        """Return their number, S."""
        return len(self.timesteps_S)

    def spread(self, count: int) -> "Points":
        """Return at most `count` of them, evenly spread."""
        chosen = torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()
        return Points(
            latents_SX=self.latents_SX[chosen], timesteps_S=self.timesteps_S[chosen], seconds=self.seconds
        )

    def rows(self, index: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return one of them `count` times: latents, timesteps and seconds."""
        latents_BX = self.latents_SX[index : index + 1].expand(count, *self.latents_SX.shape[1:])
        timesteps_B = self.timesteps_S[index : index + 1].expand(count)
        return latents_BX, timesteps_B, latents_BX.new_full((count,), self.seconds)


def by_frame(values_BX: Tensor) -> Tensor:
    """Return the mean [B, T] over everything but rows and frames, of latents [B, C, T, F] or [B, T, C]."""
    return values_BX.mean((1, 3)) if values_BX.ndim == 4 else values_BX.mean(2)


def without(conditioning: Conditioning, tokens_RL: Tensor) -> Conditioning:
    """Return R rows of a one-row text, each with its `tokens_RL` (bool) masked, as padding is."""
    rows = conditioning.repeat_interleave(len(tokens_RL))
    mask_RL = rows["mask"] & ~tokens_RL.to(rows["mask"].device)
    return Conditioning(tensors={**rows.tensors, "mask": mask_RL})


def occlusion(
    denoise: Denoise, points: Points, text: Conditioning, owners_WL: Tensor, tick: Tick = lambda: None,
    *, max_rows: int = MAX_ROWS,
) -> Tensor:  # fmt: skip
    """Return the mean squared change of the output without each word, [W, T].

    ``A[w, t] = mean over points and bins of |v(x_s, prompt) - v(x_s, prompt without w)|²``.

    Args:
        denoise: the denoiser.
        points: latents of one trajectory, or of a noised clip.
        text: the encoded prompt, one row.
        owners_WL: see `tokens_of_words`.
        tick: called after each call.
        max_rows: most rows of a call; all words are in one call where they fit.
    """
    words = len(owners_WL)
    nothing_1L = torch.zeros_like(owners_WL[:1])
    rows = without(text, torch.cat([nothing_1L, owners_WL]))
    total_WT: Tensor | None = None
    for index in range(len(points)):
        parts = []
        for start in range(0, words + 1, max_rows):
            part = Conditioning(tensors={k: v[start : start + max_rows] for k, v in rows.tensors.items()})
            parts.append(denoise(*_with_text(points.rows(index, len(part["mask"])), part)))
            tick()
        output_BX = torch.cat(parts)
        change_WT = by_frame((output_BX[1:] - output_BX[:1]).square())
        total_WT = change_WT if total_WT is None else total_WT + change_WT
    assert total_WT is not None
    return total_WT / len(points)


def attention(
    denoiser: nn.Module, denoise: Denoise, points: Points, text: Conditioning, owners_WL: Tensor,
    tick: Tick = lambda: None,
) -> Tensor:  # fmt: skip
    """Return the weight that the frames give to each word, [W, T], each in [0, 1].

    The mean over points, layers, heads and frequency bins of the cross-attention's weights. Those of a layer
    are spread over the frames that its own frames cover, and the pieces of a word are summed. What goes to
    the end token, to punctuation and to padding is left out, so that a column need not sum to 1.

    Raises:
        UnsupportedError: the denoiser has no layers of cross-attention.
    """
    shape = points.latents_SX.shape
    if len(shape) != 4:
        raise UnsupportedError("the latents have no frequency; give the method occlusion")
    frames, bins = shape[2], shape[3]
    sums_TL: list[Tensor] = []

    def read(weights_BHQL: Tensor) -> Tensor:
        mean_QL = weights_BHQL.float().mean((0, 1))
        grid_TFL = mean_QL.view(*grid_of(len(mean_QL), frames, bins), -1)
        mean_TL = grid_TFL.mean(1)
        sums_TL.append(mean_TL.repeat_interleave(frames // len(mean_TL), 0))
        return weights_BHQL

    with edited(denoiser, read):
        for index in range(len(points)):
            denoise(*_with_text(points.rows(index, 1), text))
            tick()
    return owners_WL.to(sums_TL[0]) @ torch.stack(sums_TL).mean(0).T


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LearnedMask:
    """The result of `learned_mask`."""

    mask_WT: Tensor
    """In (0, 1): what each frame needs."""
    iterations: int
    """Steps of the optimiser until the loss no longer fell, or the limit."""
    factual: float
    """Error of the output with the mask, as a share of the error without any word: 0 is perfect."""
    counterfactual: float
    """Distance of the output with the complement from that without any word, as such a share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """How a mask is learned."""

    points: int = 4
    """Points of the trajectory that share the mask."""
    learning_rate: float = 0.3
    """Of Adam, on the logits."""
    size: float = 1.0
    """Weight of the mask's mean in the loss."""
    first: float = 0.5
    """Value of the mask at the start."""
    patience: int = 10
    """Iterations without an improvement after which it ends."""
    improvement: float = 1e-3
    """Share of the loss that counts as an improvement."""


class _MaskedOutput:
    """The denoiser's output with a mask [W, T] on the cross-attention, and with its complement."""

    def __init__(
        self, denoiser: nn.Module, denoise: Denoise, points: Points, text: Conditioning, owners_WL: Tensor
    ) -> None:
        if points.latents_SX.ndim != 4:
            raise UnsupportedError("the latents have no frequency; give the method occlusion")
        self.device = points.latents_SX.device
        self.frames, self._bins = points.latents_SX.shape[2:]
        self._denoiser, self._denoise, self._count = denoiser, denoise, len(points)
        self._owners_WL = owners_WL.to(self.device)
        latents_BX = points.latents_SX.repeat(2, 1, 1, 1)
        seconds_B = latents_BX.new_full((2 * len(points),), points.seconds)
        self._inputs = (
            latents_BX,
            points.timesteps_S.repeat(2),
            text.repeat_interleave(len(seconds_B)),
            seconds_B,
        )

    def __call__(self, mask_WT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs [S, X] with the mask, and with its complement."""
        mask_BWT = torch.stack([mask_WT, 1 - mask_WT]).repeat_interleave(self._count, 0)
        owners_WL = self._owners_WL.to(mask_BWT)
        # Tokens of no word, as the end and padding, keep their weight.
        factors_BTL = mask_BWT.transpose(1, 2) @ owners_WL + (1 - owners_WL.sum(0))

        def scale(weights_BHQL: Tensor) -> Tensor:
            frames, bins = grid_of(weights_BHQL.shape[2], self.frames, self._bins)
            rows, _, tokens = factors_BTL.shape
            pooled_BTL = factors_BTL.view(rows, frames, -1, tokens).mean(2)
            factors_BQL = pooled_BTL.repeat_interleave(bins, 1).to(weights_BHQL.dtype)
            return weights_BHQL * factors_BQL[:, None]

        with edited(self._denoiser, scale):
            masked_SX, complement_SX = self._denoise(*self._inputs).chunk(2)
        return masked_SX, complement_SX


def learned_mask(
    denoiser: nn.Module, denoise: Denoise, points: Points, text: Conditioning, owners_WL: Tensor,
    tick: Tick = lambda: None, *, iterations: int = 100, config: MaskConfig = MaskConfig(),
) -> LearnedMask:  # fmt: skip
    """Learn which words each frame needs: a mask M [W, T] on the cross-attention's weights.

    M multiplies the weights of a word's tokens after the softmax, at the queries of a frame, in every layer
    and head, without renormalisation, as in AudioGenX; the weights of other tokens stay. With the output v
    of the whole prompt and v0 of M = 0::

        factual        = |v(M) - v|² / |v - v0|²
        counterfactual = |v(1 - M) - v0|² / |v - v0|²
        loss           = factual + counterfactual + size · mean(M)

    AudioGenX compares hidden states by their cosine. A denoiser's output is mostly the noise, whose cosine is
    near 1 whatever the text: here the distances are relative to what the text changes at all. They are summed
    over frames before they are divided, so that frames that no word changes count little. The mask is
    deterministic: no Gumbel noise, of which AudioGenX's final mask keeps some.

    Raises:
        UnsupportedError: the denoiser has no layers of cross-attention.
    """
    masked = _MaskedOutput(denoiser, denoise, points.spread(config.points), text, owners_WL)
    shape = len(owners_WL), masked.frames
    with torch.no_grad():
        whole_SX, none_SX = masked(torch.ones(shape, device=masked.device))
    tick()
    change = by_frame((whole_SX - none_SX).square()).sum()
    if not float(change):
        # No word changes anything, as in a model that was never taught to read.
        return LearnedMask(mask_WT=torch.zeros(shape), iterations=0, factual=0.0, counterfactual=0.0)
    start = torch.logit(torch.tensor(config.first)).item()
    logits_WT = torch.full(shape, start, device=masked.device).requires_grad_()
    optimiser = torch.optim.Adam([logits_WT], lr=config.learning_rate)
    best, best_at, done = float("inf"), 0, 0
    # Kept if the loss is never finite, which the caller reports.
    kept_WT, kept = torch.full(shape, torch.nan), (1.0, 1.0)
    for done in range(1, iterations + 1):
        mask_WT = logits_WT.sigmoid()
        factual_SX, counterfactual_SX = masked(mask_WT)
        factual = by_frame((factual_SX - whole_SX).square()).sum() / change
        counterfactual = by_frame((counterfactual_SX - none_SX).square()).sum() / change
        loss = factual + counterfactual + config.size * mask_WT.mean()
        if float(loss.detach()) < best * (1 - config.improvement):
            best, best_at = float(loss.detach()), done
            kept_WT, kept = (
                mask_WT.detach().clone(),
                (float(factual.detach()), float(counterfactual.detach())),
            )
        elif done - best_at >= config.patience:
            tick()
            break
        (gradient_WT,) = torch.autograd.grad(loss, [logits_WT])
        logits_WT.grad = gradient_WT
        optimiser.step()
        tick()
    return LearnedMask(mask_WT=kept_WT, iterations=done, factual=kept[0], counterfactual=kept[1])


def grid_of(queries: int, frames: int, bins: int) -> tuple[int, int]:
    """Return the frames and bins of a layer with this many queries: the latents' halved some times.

    Raises:
        UnsupportedError: the layer has another grid.
    """
    while frames * bins > queries and frames % 2 == 0 and bins % 2 == 0:
        frames, bins = frames // 2, bins // 2
    if frames * bins != queries:
        raise UnsupportedError(f"a layer of {queries} queries has another grid than the latents")
    return frames, bins


def _with_text(
    rows: tuple[Tensor, Tensor, Tensor], text: Conditioning
) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
    latents_BX, timesteps_B, seconds_B = rows
    return latents_BX, timesteps_B, text, seconds_B
