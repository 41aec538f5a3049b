"""Candidates a second through the engine with n requests in flight, against one at a time.

    python -m benchmarks.candidates [--model mini-base] [--clips 48] [--steps 12] [--output FILE]

Each way makes the same clips through `training.preferences.sources`, as the candidates stage does. "one at a
time" has a batch of one place as well, "one, padded" the batch of the others: their clips are the same bits.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import machine, write_report
from training.preferences.candidates import CandidatesConfig, plan
from training.preferences.sources import Candidate, SourceConfig, open_source
from training.soundworld.scenes import SceneConfig, make_scene

WAYS: Mapping[str, tuple[int, int]] = {
    "one at a time": (1, 1),
    "one, padded": (1, 8),
    "8 in flight": (8, 8),
    "16 in flight": (16, 8),
}
"""Requests in flight, places of the engine's batch."""


def seconds(config: SourceConfig, candidates: Sequence[Candidate]) -> float:
    """How long the clips of `candidates` take, the model being loaded and warm."""
    maker = open_source(config)

    def make(candidate: Candidate) -> None:
        maker.generate(candidate.prompt, **candidate.options(config))

    try:
        with ThreadPoolExecutor(config.in_flight) as pool:
            list(pool.map(make, candidates[: config.in_flight]))
            start = time.perf_counter()
            list(pool.map(make, candidates))
            return time.perf_counter() - start
    finally:
        maker.close()


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini-base")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, help="CPU threads of the engine; torch's choice if not given")
    parser.add_argument("--output", type=Path, default=Path("build/bench/candidates.json"))
    arguments = parser.parse_args()
    captions = [make_scene(0, index, SceneConfig()).caption for index in range(arguments.clips)]
    found: dict[str, float] = {}
    for way, (in_flight, batch) in WAYS.items():
        source = SourceConfig(
            model=arguments.model, batch=batch, in_flight=in_flight, threads=arguments.threads
        )
        config = CandidatesConfig(source=source, strategies=("1.2",), steps=arguments.steps)
        candidates = plan(config, captions, [], [])[: arguments.clips]
        found[way] = round(arguments.clips / seconds(source, candidates), 3)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "model": arguments.model,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "clips_a_second": found,
        "over_one_at_a_time": {way: round(rate / found["one at a time"], 2) for way, rate in found.items()},
    }
    write_report(arguments.output, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
