"""Flags of the programs of the mini family, and their call of the loop."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from training.loop.fit import Evaluation, LoopConfig, adamw, fit, make_accelerator


def part_parser(description: str | None, steps: int) -> argparse.ArgumentParser:
    """Return a parser of the flags that every part's program takes: `work`, `steps`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--steps", type=int, default=steps)
    return parser


def part_arguments(description: str | None, steps: int) -> argparse.Namespace:
    """Parse the flags of a program that takes no others."""
    return part_parser(description, steps).parse_args()


def train_part(
    module: nn.Module,
    loss_at: Callable[[int], tuple[Tensor, Mapping[str, float]]],
    config: LoopConfig,
    folder: Path,
    *,
    title: str,
    evaluation: Evaluation | None = None,
) -> None:
    """Train `module` in place with `training.loop.fit`, on one thread of the CPU. Resumable.

    Args:
        module: holds the averaged weights at the end, where `config.ema` keeps any.
        loss_at: the step's number to the loss of its batch, and figures for the journal.
        config: `batch` is for the journal: `loss_at` draws the examples.
        folder: of the journal and the checkpoints.
        title: of the progress bar.
        evaluation: figures computed now and then.
    """
    config = replace(config, device="cpu", threads=1)
    fit(
        module,
        adamw(module, config),
        lambda _, positions: loss_at(int(positions[0]) // config.batch),
        config,
        folder,
        accelerator=make_accelerator(config),
        title=title,
        evaluation=evaluation,
    )
