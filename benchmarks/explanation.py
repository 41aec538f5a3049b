"""Seconds of an explanation by method, against a plain generation of the same clip.

    python -m benchmarks.explanation [--model mini] [--steps N] [--rounds 3] [--iterations 40] [--threads 1]
        [--output FILE]

The prompt, its clip and the points at which the denoiser is asked are the same for all. What is compared
takes turns; times are the processor's seconds, so that other work on the machine matters less, and medians
of the rounds. With one thread these are the seconds of the wall clock on a free processor.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from benchmarks.measuring import machine
from services.api.explanation import ATTENTION, MASK, OCCLUSION
from services.api.generation import GenerationRequest
from services.models.architectures import architecture_of
from services.models.explaining.explainer import DiffusionExplainer
from services.models.explaining.methods import MaskConfig, learned_mask, occlusion
from services.weights.uri import resolve

PROMPT: Final = "A dog barks then a siren wails"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, help="Default: the model's.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures."""
    torch.set_num_threads(arguments.threads)
    model = resolve(arguments.model)
    architecture = architecture_of(model.folder)
    explainer = DiffusionExplainer(architecture.load(model.folder), architecture)
    request = GenerationRequest.of(
        PROMPT,
        explainer.description.generation.defaults,
        seed=7,
        num_inference_steps=arguments.steps,
    )
    read = explainer.read(PROMPT)
    _, points = explainer.generate(request, read.conditioning)
    given: Any = (explainer.denoise, points, read.conditioning, read.owners_WL)

    def generate() -> None:
        clean_1X, _ = explainer.generate(request, read.conditioning)
        explainer.decoded(clean_1X, request)

    @torch.no_grad()
    def one_by_one() -> None:
        occlusion(*given, max_rows=1)

    runs: dict[str, Callable[[], object]] = {
        "generation": generate,
        OCCLUSION: lambda: explainer.matrix(OCCLUSION, points, read, 0),
        "occlusion, one word at a time": one_by_one,
        ATTENTION: lambda: explainer.matrix(ATTENTION, points, read, 0),
        MASK: lambda: explainer.matrix(MASK, points, read, arguments.iterations),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    # Until it no longer improves by a thousandth.
    long = learned_mask(explainer.denoiser, *given, iterations=400, config=MaskConfig())
    short = learned_mask(explainer.denoiser, *given, iterations=arguments.iterations, config=MaskConfig())
    return {
        "machine": machine(),
        "model": model.identity.name,
        "digest": model.digest,
        "prompt": PROMPT,
        "words": len(read.words),
        "steps": len(points),
        "threads": arguments.threads,
        "processor_seconds": {name: round(value, 3) for name, value in medians.items()},
        "times_a_generation": {
            name: round(value / medians["generation"], 2) for name, value in medians.items()
        },
        "batched_against_one_by_one": round(medians["occlusion, one word at a time"] / medians[OCCLUSION], 2),
        "mask": {
            "iterations_to_converge": long.iterations,
            "factual": round(long.factual, 4),
            "counterfactual": round(long.counterfactual, 4),
            "mean_difference_to_the_converged": round(float((short.mask_WT - long.mask_WT).abs().mean()), 4),
            "iterations_compared": short.iterations,
        },
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and write the report if asked."""
    arguments = parse(words)
    report = json.dumps(measure(arguments), indent=1) + "\n"
    print(report, end="")
    if arguments.output is not None:
        arguments.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
