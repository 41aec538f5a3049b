"""The training loop of all programs, on accelerate: resumable, exact, on one process or many.

    accelerator = make_accelerator(config)
    claim_folder(folder, flatten(whole_config))
    fit(module, adamw(module, config), loss_of, config, folder, accelerator=accelerator, title="reward")

`loss_of(module, positions)` computes the loss of some examples. A position numbers an example within the
run: step × batch + index in the batch. Data order (`examples_at`) and every random number are functions of
the seed and the position or the step, never of what ran before. So a killed run resumes bit for bit from its
last checkpoint, and a batch has the same loss in one piece, in parts, or spread over processes (up to the
order of floating-point sums, and apart from random numbers that the module draws itself, as dropout does).
The files on disk: `training.loop.run_folder`.
"""

import contextlib
import functools
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor, nn

from services.errors import MilongaError, invalid
from training.loop.checks import Count, Factor, Natural, Range, Seed, Share, check_ranges
from training.loop.progress import progress
from training.loop.run_folder import CHECKPOINTS, JOURNAL, Journal, load_checkpoint, save_checkpoint

Positions = NDArray[np.int64]
"""Numbers of examples within a run: step × batch + index in the batch."""

Figures = Mapping[str, "float | Tensor"]
"""Logged with the loss: means over the examples, under the same names at each call."""

LossFunction = Callable[[nn.Module, Positions], tuple[Tensor, Figures]]
"""Function of the module, as accelerate wraps it (only call it), and positions, to the mean loss."""


Decay = Annotated[float, Range(0, 1, below=True)]
"""Decay rate of a running average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Settings of the loop: length, optimiser, checkpoints, averaging."""

    steps: Count
    """Optimiser steps in total, earlier sessions included. They may grow when a run is resumed: the learning
    rate then follows the longer schedule from there."""
    batch: Count
    """Examples per step, over all processes and accumulated parts."""
    seed: Seed = 0
    """Seed of the data order and of all random numbers."""
    accumulation: Count = 1
    """Parts in which a process computes its share of a batch, to save memory."""
    learning_rate: Factor = 1e-3
    """Peak learning rate."""
    warmup: Natural = 50
    """Steps of linear warm-up."""
    decay: Share = 0.3
    """Share of the steps, at the end, over which the rate decays linearly to zero (1: from the start)."""
    horizon: Natural = 0
    """Step at which the rate is zero, if the training may end before; 0: its end."""
    weight_decay: Factor = 0.01
    """AdamW's weight decay, as a multiple of the learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """AdamW's decay rates of the running averages of gradients and of their squares."""
    clip: Factor = 1.0
    """Maximum norm of the gradient; 0: no clipping."""
    ema: Decay = 0.0
    """Decay of the moving average of the weights, which is then evaluated and kept; 0: no average."""
    mixed_precision: Literal["no", "tf32", "bf16", "fp16"] = "no"
    """Number format of the forward pass's matrix products. tf32: float32, of which products on an NVIDIA GPU
    read 10 bits of mantissa; elsewhere the same as no."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the accelerator, if there is one."""
    threads: Annotated[int, Range(0, 4096)] = 0
    """Torch's threads in each process; 0: torch's default. On a busy machine one is far faster."""
    checkpoint_seconds: Factor = 60.0
    """Seconds between checkpoints."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def rate_at(self, step: int) -> float:
        """Return the factor of the learning rate at `step`: warm-up, constant, linear decay to zero."""
        end = self.horizon or self.steps
        left = max(0.0, (end - step) / max(1.0, self.decay * end))
        return min(1.0, (step + 1) / max(1, self.warmup), left)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Held-out figures during training, and which weights to keep by them."""

    run: Callable[[nn.Module], Mapping[str, float]]
    """Function of the unwrapped module to figures, in evaluation mode, with averaged weights if any."""
    every: int
    """Steps between two evaluations; there is always one at the end."""
    watched: str | None
    """The figure whose highest value is the best; None: the last weights are kept."""
    patience: int = 0
    """Evaluations without a new best after which training stops early; 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """The result of a training, whose module holds the kept weights."""

    steps: int
    """Steps done."""
    best_step: int
    """The step of the kept weights."""


@dataclass(kw_only=True, slots=True)
class _State:
    """Content of a checkpoint apart from module and optimiser."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time that they took, in all sessions."""
    average: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    """`step`, `figures` and `weights` of the best evaluation."""
    stale: int = 0
    """Evaluations since then."""
    finished: bool = False


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Return an accelerator on the configured device. It replaces an earlier one of this process."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.mixed_precision == "fp16" and (config.device == "cpu" or not torch.accelerator.is_available()):
        raise invalid("loop.mixed_precision", "is fp16, which needs a GPU; give bf16 or no")
    # Without this a second stage in one process could not have another mixed precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    tf32 = config.mixed_precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return Accelerator(cpu=config.device == "cpu", mixed_precision="no" if tf32 else config.mixed_precision)


def adamw(module: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )


def examples_at(positions: Positions, size: int, seed: int) -> Positions:
    """Return the indices in [0, size) of the examples at `positions`.

    Each pass over the data has its own order, a function of the seed and the position alone.
    """
    passes, places = np.divmod(positions, size)
    pairs = zip(passes.tolist(), places.tolist(), strict=True)
    return np.array([_order(seed, number, size)[place] for number, place in pairs], dtype=np.int64)


@functools.lru_cache(maxsize=8)
def _order(seed: int, number: int, size: int) -> Positions:
    """Return the order of the examples in pass `number`."""
    return np.random.default_rng([seed, number]).permutation(size)


def fit(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss_of: LossFunction,
    config: LoopConfig,
    folder: Path,
    *,
    accelerator: Accelerator,
    title: str,
    evaluation: Evaluation | None = None,
) -> Fitted:
    """Train `module` in place, from the last checkpoint in `folder` if there is one.

    At the end it holds the weights of the best evaluation, else the averaged ones, else the last.

    Ctrl-C and SIGTERM save a checkpoint and exit with code 130; the same call then resumes from it.

    Raises:
        InvalidInputError: the batch can't be divided among processes and parts.
        OutputError: a checkpoint or the journal can't be written; what was written before is complete.
        MilongaError: the loss is not finite.
    """
    return _Loop(module, optimiser, loss_of, config, folder, accelerator, title, evaluation).run()


class _Loop:
    """One call of `fit`."""

    def __init__(
        self,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        loss_of: LossFunction,
        config: LoopConfig,
        folder: Path,
        accelerator: Accelerator,
        title: str,
        evaluation: Evaluation | None,
    ) -> None:
        parts = accelerator.num_processes * config.accumulation
        if config.batch % parts:
            raise invalid(
                "batch",
                f"is {config.batch}, must be a multiple of processes ({accelerator.num_processes}) × "
                f"accumulation ({config.accumulation})",
            )
        self.loss_of, self.config, self.accelerator, self.title = loss_of, config, accelerator, title
        self.evaluation = evaluation
        self.rates = [group["lr"] for group in optimiser.param_groups]
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self.module, self.optimiser = accelerator.prepare(module, optimiser)
        self.bare: nn.Module = accelerator.unwrap_model(self.module)
        self.folder, self.state = folder, _State()
        if config.ema:
            self.state.average = {k: v.detach().clone() for k, v in self.bare.state_dict().items()}

    def run(self) -> Fitted:
        main = self.accelerator.is_main_process
        self._restore()
        state, saved = self.state, time.monotonic()
        with contextlib.ExitStack() as stack:
            stopped = stack.enter_context(_stop_on_signals())
            journal = stack.enter_context(Journal(self.folder / JOURNAL, state.step)) if main else None
            bar = stack.enter_context(
                progress(
                    initial=state.step,
                    total=self.config.steps,
                    desc=self.title,
                    unit="step",
                    disable=not main,
                )
            )
            self.module.train()
            while state.step < self.config.steps and not state.finished:
                began, step = time.monotonic(), state.step
                figures = self._step(step)
                # A signal to one process stops all: one that stopped alone would leave the others waiting.
                figures |= {"stop": float(stopped.is_set())}
                figures |= {"due": float(main and began - saved >= self.config.checkpoint_seconds)}
                figures = self._over_processes(figures)
                stop, due = figures.pop("stop") > 0, figures.pop("due") > 0
                if not math.isfinite(figures["loss"]):
                    raise MilongaError(
                        f"the loss is {figures['loss']} at step {step}; lower the learning rate, or look at "
                        f"{self.folder / JOURNAL}"
                    )
                elapsed = time.monotonic() - began
                state.step, state.seconds = step + 1, state.seconds + elapsed
                bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
                bar.update()
                if journal is not None:
                    speed = {"samples_per_second": self.config.batch / elapsed, "seconds": state.seconds}
                    journal.write({"step": step, **figures, **speed})
                held_out = self._evaluate()
                if journal is not None and held_out:
                    journal.write({"step": step, "evaluation": held_out})
                done = self.state.finished or state.step == self.config.steps
                if due or stop or done:
                    self._save(journal)
                    saved = time.monotonic()
                if stop:
                    bar.close()
                    if main:
                        print(
                            f"stopped after step {step}, and saved: the same command resumes from there",
                            file=sys.stderr,
                        )
                    raise SystemExit(130)
        return self._keep()

    def _step(self, step: int) -> dict[str, float]:
        """Take one optimiser step; return this process's mean figures."""
        config, rank = self.config, self.accelerator.process_index
        multiplier = config.rate_at(step)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * multiplier
        positions = np.arange(step * config.batch, (step + 1) * config.batch)
        shares = positions.reshape(config.accumulation, self.accelerator.num_processes, -1)[:, rank]
        totals: dict[str, float] = {}
        for part, share in enumerate(shares):
            _seed([config.seed, step, part, rank])
            last = part == config.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                with self.accelerator.autocast():
                    loss, figures = self.loss_of(self.module, share)
                self.accelerator.backward(loss / config.accumulation)
            for name, value in {"loss": loss.detach(), **figures}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / config.accumulation
        norm = self.accelerator.clip_grad_norm_(self.parameters, config.clip or math.inf)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if config.ema:
            _update_average(self.state.average, self.bare, _ema_decay(step, config.ema))
        return totals | {"norm": float(norm), "rate": self.rates[0] * multiplier}

    def _over_processes(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the means over all processes."""
        if self.accelerator.num_processes == 1:
            return figures
        # CUDA and CPU know float64; MPS, which does not, has one process.
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.accelerator.device)
        means = self.accelerator.reduce(values, reduction="mean")
        return dict(zip(figures, means.tolist(), strict=True))

    def _evaluate(self) -> dict[str, float]:
        """Evaluate if it is due, and keep the best weights. Returns the figures, or nothing."""
        state, evaluation = self.state, self.evaluation
        if evaluation is None or (state.step % evaluation.every and state.step < self.config.steps):
            return {}
        own = {k: v.detach().clone() for k, v in self.bare.state_dict().items()} if state.average else {}
        if own:
            self.bare.load_state_dict(state.average)
        self.module.eval()
        with torch.no_grad():
            figures = dict(evaluation.run(self.bare))
        self.module.train()
        if self.accelerator.num_processes > 1:
            # The same figures for all, should their hardware differ in the last digit.
            (figures,) = broadcast_object_list([figures])
        state.stale += 1
        watched, best = evaluation.watched, state.best
        if watched is not None and (best is None or figures[watched] > best["figures"][watched]):
            weights = {k: v.detach().cpu().clone() for k, v in self.bare.state_dict().items()}
            state.best, state.stale = {"step": state.step, "figures": figures, "weights": weights}, 0
        if own:
            self.bare.load_state_dict(own)
        state.finished = 0 < evaluation.patience <= state.stale
        return figures

    def _keep(self) -> Fitted:
        """Load the weights to keep into the caller's module."""
        self.accelerator.wait_for_everyone()
        # Without accelerate's wrapper of `forward`, which would stay on the module.
        self.bare = self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        state = self.state
        best_step = state.step
        if state.best is not None:
            self.bare.load_state_dict(state.best["weights"])
            best_step = state.best["step"]
        elif state.average:
            self.bare.load_state_dict(state.average)
        return Fitted(steps=state.step, best_step=best_step)

    def _save(self, journal: "Journal | None") -> None:
        """Write a checkpoint, from the main process."""
        if journal is not None:
            journal.sync()
            scaler, state = self.accelerator.scaler, self.state
            content = {
                "module": self.bare.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "state": {name: getattr(state, name) for name in _State.__slots__},
            }
            save_checkpoint(self.folder / CHECKPOINTS, self.state.step, content)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        content = load_checkpoint(self.folder / CHECKPOINTS)
        if content is None:
            return
        self.bare.load_state_dict(content["module"])
        self.optimiser.load_state_dict(content["optimiser"])
        if content["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        device = next(self.bare.parameters()).device
        self.state = _State(**content["state"])
        if self.state.step > self.config.steps:
            made = f"is {self.config.steps}, and {self.folder} holds a run of {self.state.step} steps"
            raise invalid("loop.steps", f"{made}; give at least as many, or --fresh to start over")
        self.state.average = {k: v.to(device) for k, v in self.state.average.items()}


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set, instead of interrupting the program."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seed(numbers: list[int]) -> None:
    """Seed every global generator from `numbers`."""
    state = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
    np.random.seed(int(state[0]))
    random.seed(int(state[1]))


def _ema_decay(step: int, limit: float) -> float:
    """Return the decay of the average at `step`: short memory at first, `limit` in the long run."""
    return min(limit, (1 + step) / (10 + step))


@torch.no_grad()
def _update_average(average: dict[str, Tensor], module: nn.Module, keep: float) -> None:
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - keep)
        else:
            average[name].copy_(value)
