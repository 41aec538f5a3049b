"""The denoising error on held-out clips, before and after a fine-tuning.

Shape legend: B batch, X a family's own shape of latents.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from training.data.captions import CaptionExample
from training.finetuning.session import Session, errors_of
from training.objectives.noising import draw_noising

DRAWS = 8
"""Noises and timesteps of each clip; the same before and after."""
_BATCH = 16


@torch.no_grad()
def held_out_errors(policy: nn.Module, examples: Sequence[CaptionExample], session: Session) -> list[float]:
    """Return the mean denoising error of each example over `DRAWS` noises, always the same ones."""
    config = replace(session.config.noising, condition_dropout=0.0)
    device = next(policy.parameters()).device
    policy.to(session.accelerator.device).eval()
    errors = np.zeros(len(examples))
    for start in range(0, len(examples) * DRAWS, _BATCH):
        numbers = np.arange(start, min(start + _BATCH, len(examples) * DRAWS))
        picked = [examples[number // DRAWS] for number in numbers.tolist()]
        clean_BX = session.latents.clips([example.clip for example in picked])
        noising = draw_noising(
            numbers, tuple(clean_BX.shape[1:]), config,
            batch=_BATCH, seed=session.config.loop.seed, continuous=session.objective.continuous,
        )  # fmt: skip
        captions = [example.caption for example in picked]
        errors_B = errors_of(policy, clean_BX, captions, noising, session).policy_B
        np.add.at(errors, numbers // DRAWS, errors_B.float().cpu().numpy() / DRAWS)
    policy.to(device)
    return [float(error) for error in errors]


def compare_errors(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Return the entry ``held_out`` of a report: both means, and their paired difference with its error."""
    difference = np.subtract(after, before)
    spread = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else float("nan")
    return {
        "clips": len(difference),
        "error_before": float(np.mean(before)),
        "error_after": float(np.mean(after)),
        "difference": float(difference.mean()),
        "standard_error": None if np.isnan(spread) else float(spread),
    }
