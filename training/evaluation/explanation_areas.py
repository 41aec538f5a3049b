"""Deletion and insertion: do the words that an explanation ranks first carry the sound?

Words are masked in the cross-attention one after another, and what the text adds in an event's frames is
measured after each. All on the same noised latents: no sampling is between cause and effect.

Shapes: W words, L text tokens, T frames, S points, X latents.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.models.explaining.explainer import DiffusionExplainer, ReadPrompt
from services.models.explaining.methods import Points, by_frame, without
from services.models.latent import Conditioning


@torch.no_grad()
def remaining(
    explainer: DiffusionExplainer,
    points: Points,
    prompt: ReadPrompt,
    masked_RW: NDArray[np.bool_],
    inside_T: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return for each set of masked words how much is left of what the text adds in some frames, [R].

    ``1 - |v(masked) - v|² / |v(all masked) - v|²``, summed over points and frames: 1 if nothing is masked, 0
    if everything is. Cut to [0, 1], since a part may change more than the whole.
    """
    owners_WL = prompt.owners_WL
    sets_RL = torch.from_numpy(masked_RW).float() @ owners_WL.float() > 0
    ends_2L = torch.stack([torch.zeros_like(owners_WL[0]), owners_WL.any(0)])
    rows = without(prompt.conditioning, torch.cat([ends_2L, sets_RL]))
    inside = torch.from_numpy(inside_T)
    changes = torch.zeros(len(masked_RW) + 1)
    for index in range(len(points)):
        output_BX = _called(explainer, points, index, rows)
        changes += by_frame((output_BX[1:] - output_BX[:1]).square())[:, inside].sum(1)
    share = 1 - changes[1:] / max(float(changes[0]), 1e-30)
    return np.asarray(share.clamp(0, 1).double().numpy())


def _called(explainer: DiffusionExplainer, points: Points, index: int, rows: Conditioning) -> Tensor:
    latents_BX, timesteps_B, seconds_B = points.rows(index, len(rows["mask"]))
    return explainer.denoise(latents_BX, timesteps_B, rows, seconds_B)


def area_sets(order: Sequence[int], words: int) -> NDArray[np.bool_]:
    """Return the masked words [2 (W - 1), W] of both curves: deletion from the first word, then insertion.

    Deletion masks the first 1, 2, … words of `order`, insertion all but them; the ends, where nothing or
    everything is masked, are known.
    """
    sets = np.zeros((2 * (words - 1), words), dtype=bool)
    for count in range(1, words):
        sets[count - 1, list(order[:count])] = True
        sets[words - 1 + count - 1, list(order[count:])] = True
    return sets


def areas(left_R: NDArray[np.float64]) -> tuple[float, float]:
    """Return the areas under the curves of `area_sets`: (deletion, insertion), each from 0 to 1.

    A good order has little area of deletion, since the sound is gone at once, and much of insertion.
    """
    deletion, insertion = np.split(left_R, 2)
    return (
        float(np.trapezoid([1.0, *deletion, 0.0], dx=1 / (len(deletion) + 1))),
        float(np.trapezoid([0.0, *insertion, 1.0], dx=1 / (len(insertion) + 1))),
    )
