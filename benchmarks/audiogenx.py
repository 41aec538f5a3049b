"""What AudioGenX costs: one batched module against upstream's list of networks, with and without history.

    python -m benchmarks.audiogenx --model mini:audiogen --output benchmarks/audiogenx-cost.json
    python -m benchmarks.audiogenx --steps 253 --width 1536 --tokens 12     # the generators at
    AudioGen-medium's size

A form is measured in a process of its own: CPU seconds of an iteration (the median), and the peak of the
resident memory above that before the first one. With `--steps`, only the generators and Adam are measured,
without a language model.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from services.models.architectures import load_generator
from services.models.audiogen.audiogenx import (
    HIDDEN,
    LEARNING_RATE,
    WEIGHT_DECAY,
    MaskGenerators,
    audiogenx_losses,
    gumbel_noise,
    make_optimizer,
    relaxed,
    states_under,
)
from services.models.audiogen.masking import masked_attention
from services.models.audiogen.pipeline import AudioGenPipeline
from services.weights.uri import resolve

FORMS = ("upstream: a list of networks, without history", "batched, without history", "batched, with history")


class ListOfNetworks(nn.Module):
    """Upstream's generators: a network per step, called one after another."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, HIDDEN), nn.PReLU(), nn.Linear(HIDDEN, 1), nn.Sigmoid())
            for _ in range(steps)
        )

    def forward(self, text_LW: Tensor) -> Tensor:
        """Return p [S, L]."""
        return torch.stack([network(text_LW)[:, 0] for network in self.networks])


def measured(iterate: Callable[[], None], iterations: int) -> dict[str, float]:
    """Return CPU seconds of an iteration and the growth of the peak memory in MiB."""
    before = psutil.Process().memory_info().rss
    seconds = []
    for _ in range(iterations):
        began = time.process_time()
        iterate()
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_seconds": statistics.median(seconds), "mib": max(0, peak - before) / 2**20}


def optimizer_of(form: str, generators: nn.Module) -> torch.optim.Optimizer:
    """Return Adam as the form has it: ours is one kernel."""
    if form == FORMS[0]:
        return torch.optim.Adam(generators.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return make_optimizer(generators)


def generators_only(form: str, steps: int, width: int, tokens: int, iterations: int) -> dict[str, float]:
    """Measure the generators and Adam, on a sum of their masks."""
    torch.set_num_threads(1)
    text_LW = torch.randn(tokens, width)
    generators = ListOfNetworks(steps, width) if form == FORMS[0] else MaskGenerators(steps, width)
    optimizer = optimizer_of(form, generators)

    def iterate() -> None:
        loss = relaxed(generators(text_LW), torch.zeros(steps, tokens, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return measured(iterate, iterations)


def whole(form: str, model: str, tokens: int, iterations: int) -> dict[str, float]:
    """Measure iterations of AudioGenX on a random clip of the model's default duration."""
    torch.set_num_threads(1)
    pipeline: Any = load_generator(resolve(model).folder)
    assert isinstance(pipeline, AudioGenPipeline)
    width, steps = pipeline.decoder.config.hidden_size, pipeline.description.defaults.num_inference_steps
    text_LW, target_SW = torch.randn(tokens, width), torch.randn(steps, width)
    sequence_KS = torch.randint(0, pipeline.special, (pipeline.codebooks, steps))
    generators = ListOfNetworks(steps, width) if form == FORMS[0] else MaskGenerators(steps, width)
    optimizer = optimizer_of(form, generators)
    random = torch.Generator().manual_seed(0)

    def iterate() -> None:
        p_SL = generators(text_LW)
        mask_SL = relaxed(p_SL, gumbel_noise((steps, tokens, 2), random))
        with masked_attention(pipeline.decoder):
            kept_SW, lost_SW = states_under(
                pipeline.decoder, sequence_KS, text_LW, (mask_SL, 1 - mask_SL), history=form == FORMS[2]
            )
        optimizer.zero_grad()
        audiogenx_losses(target_SW, kept_SW, lost_SW, p_SL).total.backward()
        optimizer.step()

    return measured(iterate, iterations)


def main(words: list[str] | None = None) -> None:
    """Measure all forms, and print or write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini:audiogen")
    parser.add_argument("--steps", type=int, help="measure the generators only, for so many steps")
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    found: dict[str, Any] = {}
    for form in FORMS[:2] if arguments.steps else FORMS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            if arguments.steps:
                sizes = (arguments.steps, arguments.width, arguments.tokens, arguments.iterations)
                found[form] = pool.apply(generators_only, (form, *sizes))
            else:
                found[form] = pool.apply(
                    whole, (form, arguments.model, arguments.tokens, arguments.iterations)
                )
    report = {
        "settings": {name: str(value) for name, value in vars(arguments).items() if name != "output"},
        "torch": torch.__version__,
        "an iteration": found,
    }
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
