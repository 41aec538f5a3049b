"""A tiny pipeline, pairs for it, and a small DPO run, in this process or as a program of its own.

python -m tests.training.finetuning.finetune_program OUTPUT START PAIRS [--kill-at STEP] [--accumulation N]
"""

import argparse
import io
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import soundfile
from torch import Tensor, nn

from services.models.manifest import write_manifest
from tests.tiny import tiny_pipeline
from training.finetuning import dpo as train_dpo_module
from training.finetuning.dpo import DpoTraining, train_dpo
from training.finetuning.session import PairData
from training.loop.fit import LoopConfig, Positions
from training.loop.run_folder import JOURNAL, read_journal
from training.objectives.noising import NoisingConfig

PROMPTS = ("a dog barks then a siren wails", "a bird sings", "rain falls while a bell rings", "a cat")
LOOP = LoopConfig(
    steps=6,
    batch=8,
    learning_rate=1e-3,
    warmup=2,
    ema=0.5,
    device="cpu",
    threads=1,
    checkpoint_seconds=0.0,
)


def write_model(folder: Path, seed: int = 0, name: str = "tiny") -> Path:
    """A tiny pipeline's folder, as a model URI may name it."""
    tiny_pipeline(seed).save_pretrained(folder)
    write_manifest(folder, name=name, version="1", license="Apache-2.0")
    return folder


def clip(seed: int, seconds: float = 0.64, rate: int = 16_000) -> bytes:
    """A WAV file of noise."""
    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def write_pairs(
    path: Path, clips: Sequence[tuple[bytes, bytes]], prompts: Sequence[str | None] = PROMPTS
) -> Path:
    """Parquet with audio-alpaca's columns; a few rows per group. The prompts are repeated."""
    sides = [[{"bytes": pair[side], "path": None} for pair in clips] for side in (0, 1)]
    prompts = [prompts[number % len(prompts)] for number in range(len(clips))]
    table = pa.table(
        {"prompt": prompts, "chosen": sides[0], "rejected": sides[1], "strategy": ["1.2"] * len(clips)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def some_pairs(path: Path, count: int = 10) -> Path:
    """Pairs whose chosen clips are louder noise than the rejected ones."""
    return write_pairs(path, [(clip(number), clip(1_000 + number)) for number in range(count)])


def dpo(start: Path, pairs: Path, **changes: Any) -> DpoTraining:
    """A short run on tiny models."""
    config = DpoTraining(
        name="dpo-smoke",
        start=f"file:{start}",
        data=PairData(pairs=(pairs,)),
        loop=LOOP,
        noising=NoisingConfig(blank=0.25, late=0.25),
        beta=500.0,
    )
    return replace(config, **changes)


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The journal's lines of steps."""
    return [row for row in read_journal(output.with_name(f"{output.name}.run") / JOURNAL) if "loss" in row]


def losses_of(output: Path) -> list[float]:
    """Step by step."""
    return [row["loss"] for row in rows_of(output)]


def kill_at(step: int) -> None:
    """End this process by SIGKILL when the step `step` begins."""
    inner = train_dpo_module.loss_of

    def loss_of(policy: nn.Module, positions: Positions, **rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if int(positions[0]) // LOOP.batch == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(policy, positions, **rest)

    train_dpo_module.loss_of = loss_of


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--accumulation", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.kill_at is not None:
        kill_at(arguments.kill_at)
    loop = replace(LOOP, accumulation=arguments.accumulation)
    train_dpo(dpo(arguments.start, arguments.pairs, loop=loop), arguments.output)
