"""The loop that every program of the mini family shares: resumable, with progress and a journal.

All randomness of a step comes from its number, so a killed run goes on exactly where it was.
"""

import argparse
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

LossFunction = Callable[[int], tuple[Tensor, dict[str, float]]]
"""Step number to the loss to minimise and further figures to write down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long and how fast to train."""

    steps: int
    """Optimiser steps in all, those of earlier runs included."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.25
    """Share of the steps, at the end, over which the rate falls linearly to zero. Before that it is
    constant, so that a run can be made longer without regret."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Gradient norm limit."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; 0 keeps none."""
    save_every: float = 60.0
    """Seconds between checkpoints."""

    def learning_rate_at(self, step: int) -> float:
        """Warm-up, constant, linear decay."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), left)


def save_atomically(state: object, path: Path) -> None:
    """`torch.save` to a temporary name, then rename."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def ema_decay(step: int, limit: float) -> float:
    """Short memory at first, `limit` in the long run."""
    return min(limit, (1 + step) / (10 + step))


def _stop_on_signals() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set from now on, instead of breaking off wherever the program is."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def part_arguments(description: str | None, steps: int) -> argparse.Namespace:
    """Return the flags that every part's program takes (`work`, `steps`), and keep torch to one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--steps", type=int, default=steps)
    torch.set_num_threads(1)
    return parser.parse_args()


def _update_average(average: dict[str, Tensor], module: nn.Module, keep: float) -> None:
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - keep)


def fit(
    module: nn.Module, loss_at: LossFunction, config: LoopConfig, folder: Path, *, title: str
) -> nn.Module:
    """Train `module` in place and load its averaged weights, if `config.ema`, at the end.

    Checkpoints to `folder`/checkpoint.pt, appends to `folder`/journal.jsonl; a second call goes on
    from the checkpoint. Ctrl-C and SIGTERM save, then end the program with code 130.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    average = {k: v.detach().clone() for k, v in module.state_dict().items()} if config.ema else {}
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, first, seconds = state["average"] or average, state["step"], state["seconds"]

    def save(step: int) -> None:
        save_atomically(
            {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "seconds": seconds,
            },
            checkpoint,
        )

    stop = _stop_on_signals()
    last_save, smooth = time.monotonic(), math.nan
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=title, mininterval=5.0)
    with (folder / "journal.jsonl").open("a") as journal:
        for step in bar:
            if stop.is_set():
                # Between two steps, never within one: what is saved is a whole number of them.
                save(step)
                bar.close()
                print(
                    f"stopped at step {step}, and saved: the same command goes on from there", file=sys.stderr
                )
                sys.exit(130)
            began = time.process_time()
            rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss, figures = loss_at(step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            if config.ema:
                _update_average(average, module, ema_decay(step, config.ema))
            seconds += time.process_time() - began
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            if step % 20 == 0:
                row = {
                    "step": step,
                    "loss": smooth,
                    "norm": norm.item(),
                    "rate": rate,
                    "cpu_seconds": seconds,
                }
                journal.write(json.dumps(row | figures) + "\n")
                journal.flush()
                bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            if time.monotonic() - last_save > config.save_every:
                save(step + 1)
                last_save = time.monotonic()
    save(max(first, config.steps))
    if config.ema:
        module.load_state_dict(average)
    return module
