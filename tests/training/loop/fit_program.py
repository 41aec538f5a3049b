"""A small training for the tests of the loop, in this process or as a program of its own.

python -m tests.training.loop.fit_program FOLDER [--kill-at STEP] [--accumulation N] [--dropout P]
"""

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from training.loop.config import flatten
from training.loop.fit import (
    Evaluation,
    Fitted,
    LoopConfig,
    Positions,
    adamw,
    examples_at,
    fit,
    make_accelerator,
)
from training.loop.run_folder import GROWING, claim_folder

CONFIG = LoopConfig(
    steps=40,
    batch=8,
    seed=5,
    learning_rate=1e-2,
    warmup=4,
    ema=0.9,
    device="cpu",
    threads=1,
    checkpoint_seconds=0.0,
)
EXAMPLES = 50


def build(dropout: float) -> nn.Module:
    """The same weights at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


def train(
    folder: Path,
    config: LoopConfig = CONFIG,
    *,
    dropout: float = 0.1,
    kill_at: int | None = None,
    stop_at: int | None = None,
    patience: int = 0,
) -> tuple[nn.Module, Fitted]:
    """Fit a sum of products; `kill_at` and `stop_at` are steps at which the process gets a signal."""
    x = torch.randn(EXAMPLES, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, :2] * x[:, 2:]).sum(1)
    accelerator = make_accelerator(config)
    claim_folder(folder, {f"loop.{name}": value for name, value in flatten(config).items()}, free=(GROWING,))
    module = build(dropout)

    def loss_of(module: nn.Module, positions: Positions) -> tuple[Tensor, dict[str, Tensor]]:
        step = int(positions[0]) // config.batch
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        rows = torch.from_numpy(examples_at(positions, EXAMPLES, config.seed))
        # The noise is an example's own, so it does not depend on how a batch is divided.
        noise = [np.random.default_rng([config.seed, int(p)]).normal(0, 0.1, 4) for p in positions]
        error = module(x[rows] + torch.from_numpy(np.stack(noise)).float())[:, 0] - y[rows]
        return error.square().mean(), {"absolute": error.detach().abs().mean()}

    def run(module: nn.Module) -> dict[str, float]:
        return {"score": -float((module(x)[:, 0] - y).square().mean())}

    evaluation = Evaluation(run=run, every=10, watched="score", patience=patience)
    fitted = fit(
        module,
        adamw(module, config),
        loss_of,
        config,
        folder,
        accelerator=accelerator,
        title="test",
        evaluation=evaluation,
    )
    return module, fitted


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.1)
    arguments = parser.parse_args()
    train(
        arguments.folder,
        replace(CONFIG, accumulation=arguments.accumulation),
        dropout=arguments.dropout,
        kill_at=arguments.kill_at,
    )
