"""What cached latents, low-rank adapters and checkpointed activations save in a DPO step, on this machine.

    python -m benchmarks.training [--model mini-base] [--batch 32] [--steps 4] [--output FILE]

Each variant trains in a process of its own, for a few steps, on the same pairs: scenes of the sound world.
Speed: the median step. Memory: on a GPU torch's own high-water mark; on a CPU the process's, less what it had
when the libraries were loaded and nothing else. Caches are warm where there are any.
"""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import soundfile
import torch

from benchmarks.measuring import machine, memory_mib, write_report
from training.data.latents import LatentConfig
from training.finetuning.dpo import DpoTraining, train_dpo
from training.finetuning.session import LoraConfig, PairData
from training.loop.run_folder import JOURNAL, read_journal
from training.runs.recipes import dpo_mini
from training.soundworld.scenes import SceneConfig, make_scene
from training.soundworld.synthesis import SAMPLING_RATE

SCENES = SceneConfig()
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "full, encoding in every step": {"latents": LatentConfig(encode_online=True)},
    "full, gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA rank 8": {"lora": LoraConfig(rank=8)},
    "LoRA rank 8, gradient checkpointing": {"lora": LoraConfig(rank=8), "gradient_checkpointing": True},
}
"""What differs from the mini recipe."""
MIB = 1024**2


def write_pairs(path: Path, count: int) -> None:
    """Scenes and their captions, each against the next scene: what they sound like changes no cost."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    scenes = [make_scene(0, index, SCENES) for index in range(count)]
    clips = []
    for scene in scenes:
        file = io.BytesIO()
        soundfile.write(file, scene.waveform, SAMPLING_RATE, format="FLAC")
        clips.append({"bytes": file.getvalue(), "path": None})
    prompts = [scene.caption for scene in scenes]
    columns = {"prompt": prompts, "chosen": clips, "rejected": [*clips[1:], clips[0]]}
    pq.write_table(pa.table(columns), path, row_group_size=32)


def config_of(arguments: argparse.Namespace, variant: str) -> DpoTraining:
    """The mini recipe on the benchmark's pairs, with what the variant changes."""
    recipe = dpo_mini()
    changes = dict(VARIANTS[variant])
    latents = replace(changes.pop("latents", LatentConfig()), cache=arguments.work / "cache")
    loop = replace(
        recipe.loop, steps=arguments.steps + 1, batch=arguments.batch, device="auto", checkpoint_seconds=1e9
    )
    data = PairData(pairs=(arguments.work / "pairs.parquet",))
    return replace(recipe, start=arguments.model, data=data, loop=loop, latents=latents, **changes)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train one variant in this process."""
    before = memory_mib()["VmRSS"]
    output = arguments.work / arguments.variant.replace(" ", "-").replace(",", "")
    # The mark of what was needed on the way here, before anything was measured, is wiped out.
    Path("/proc/self/clear_refs").write_text("5")
    report = train_dpo(config_of(arguments, arguments.variant), output, fresh=True)
    rows = [row for row in read_journal(output.with_name(f"{output.name}.run") / JOURNAL) if "loss" in row]
    cuda = torch.cuda.is_available()
    return {
        # The first step, in which buffers are made, does not count.
        "seconds_a_step": median(arguments.batch / row["samples_per_second"] for row in rows[1:]),
        "peak_mib": torch.cuda.max_memory_allocated() / MIB if cuda else memory_mib()["VmHWM"] - before,
        "parameters_that_learn": report["parameters"]["learn"],
    }


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini-base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("build/bench/training.json"))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        arguments.work = Path(folder)
        write_pairs(arguments.work / "pairs.parquet", 2 * arguments.batch)
        command = [sys.executable, "-m", "benchmarks.training", "--model", arguments.model, "--work", folder]
        command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
        # Twice the first one: only what it leaves in the cache counts the first time.
        for variant in ("full", *VARIANTS):
            done = subprocess.run([*command, "--variant", variant], stdout=subprocess.PIPE, check=True)
            found[variant] = json.loads(done.stdout.splitlines()[-1])
    full = found["full"]
    ratios = {
        variant: {
            name: round(figures[name] / full[name], 3)
            for name in ("seconds_a_step", "peak_mib", "parameters_that_learn")
        }
        for variant, figures in found.items()
    }
    report = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "model": arguments.model,
        "pairs_a_step": arguments.batch,
        "steps": arguments.steps,
        "variants": found,
        "over_full": ratios,
    }
    write_report(arguments.output, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
