"""Latency under load on `mini`: step-level batches against whole batches and one clip at a time.

    python -m benchmarks.latency [--seconds 60] [--policy step-level …] [--load 0.5 0.8 0.95]
    python -m benchmarks.latency --plot docs/images/latency-load.png

Requests arrive as a Poisson process, whether or not others are done: four drafts (the profile `draft`) for
each long render (50 steps). The rates are shares of the engine's capacity, measured before by a burst. All
policies get the same requests at the same moments:

* step-level: the engine; clips join and leave between two steps;
* whole batches: waiting requests of one kind, up to eight, are rendered together to the end;
* one at a time: no batches, first come, first served.

Each point is written to `--output` when it is measured; the same command continues. `--plot` draws them.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.arrivals import Server, batch_server, engine_server, latencies, poisson
from benchmarks.measuring import PROMPT, machine, versions
from services.engine import Engine, EngineConfig
from services.files import write_atomically
from services.models.architectures import load_generator
from services.models.latent import clip_generator
from services.models.mini import mini_folder
from services.models.tango.pipeline import TangoPipeline

LOADS: Final = (0.5, 0.8, 0.95)
KINDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "draft": {"profile": "draft"},
    "long render": {"num_inference_steps": 50},
}
"""Options of each kind of request."""
LONG_SHARE: Final = 0.2
LARGEST: Final = 8
"""Clips in a batch, as the engine's default."""
BURST: Final = 40
"""Requests at once that measure the capacity."""


def kind_of(index: int) -> str:
    """Return the kind of request `index`; the same in every run."""
    return "long render" if np.random.default_rng([1, index]).random() < LONG_SHARE else "draft"


class Bench:
    """The model, and the servers of the policies."""

    def __init__(self, pipeline: TangoPipeline, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self._pipeline = pipeline
        self._config = EngineConfig(threads=threads, max_queue=4096)

    def capacity(self, burst: int = BURST) -> float:
        """Return the requests a second of the engine when all come at once, after a round that warms up."""
        seconds = 0.0
        with Engine(self._pipeline, self._config) as engine:
            for _ in range(2):
                began = time.perf_counter()
                latencies([0.0] * burst, self._step_level(engine))
                seconds = time.perf_counter() - began
        return burst / seconds

    def latencies(self, policy: str, arrivals: Sequence[float]) -> Mapping[str, Any]:
        """Return the latencies by kind of the requests that arrive then."""
        if policy == "step-level":
            with Engine(self._pipeline, self._config) as engine:
                found = latencies(arrivals, self._step_level(engine))
        else:
            found = latencies(arrivals, WITHOUT_ENGINE[policy](self._render))
        kinds = np.array([kind_of(index) for index in range(len(arrivals))])
        return {kind: _quantiles(found[kinds == kind]) for kind in KINDS if (kinds == kind).any()}

    def _step_level(self, engine: Engine) -> Server:
        return engine_server(
            engine, lambda index: engine.request(PROMPT, seed=index, **KINDS[kind_of(index)])
        )

    def _render(self, indices: Sequence[int]) -> None:
        """Render requests of one kind together."""
        self._pipeline(
            [PROMPT] * len(indices),
            generator=[clip_generator(index) for index in indices],
            **KINDS[kind_of(indices[0])],
        )


Render = Callable[[Sequence[int]], object]

WITHOUT_ENGINE: Final[Mapping[str, Callable[[Render], Server]]] = {
    "whole batches": lambda render: batch_server(render, LARGEST, kind_of),
    "one at a time": partial(batch_server, largest=1),
}
POLICIES: Final = ("step-level", *WITHOUT_ENGINE)


def _quantiles(latencies_N: Any) -> dict[str, float]:
    p50, p95 = np.quantile(latencies_N, (0.5, 0.95))
    return {
        "requests": len(latencies_N),
        "mean": round(float(np.mean(latencies_N)), 4),
        "p50": round(float(p50), 4),
        "p95": round(float(p95), 4),
        "max": round(float(np.max(latencies_N)), 4),
    }


def measure(
    bench: Bench, report: dict[str, Any], policies: Sequence[str], loads: Sequence[float], seconds: float
) -> Iterator[str]:
    """Fill in the points that are missing in the report; yield the name of each."""
    if "capacity" not in report:
        report["capacity"] = round(bench.capacity(), 3)
        yield "capacity"
    for policy in policies:
        points = report["points"].setdefault(policy, {})
        for load in loads:
            if f"{load:g}" not in points:
                arrivals = poisson(load * report["capacity"], seconds)
                points[f"{load:g}"] = {**bench.latencies(policy, arrivals), "seconds": seconds}
                yield f"{policy}, load {load:g}"


def plot(report: Mapping[str, Any]) -> bytes:
    """Return the plot of latency against load, a panel per kind, a line per policy; PNG."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        for number, (policy, points) in enumerate(report["points"].items()):
            loads = sorted((load for load in points if kind in points[load]), key=float)
            for quantile, style in (("p50", "-"), ("p95", "--")):
                axis.plot(
                    [float(load) for load in loads],
                    [points[load][kind][quantile] for load in loads],
                    style,
                    color=f"C{number}",
                    marker="o",
                    markersize=3,
                    label=f"{policy}, {quantile}",
                )
        axis.set_title(kind)
        axis.set_xlabel("requests a second / capacity of the engine")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("latency, seconds")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the points that are missing, or draw those that there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals at each point")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--load", nargs="+", type=float, default=LOADS, help="shares of the capacity")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/latency.json"))
    parser.add_argument("--plot", type=Path, help="draw the points into this PNG file, and measure nothing")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": versions("torch", "diffusers"),
        "points": {},
    }
    if arguments.output.exists():
        report = json.loads(arguments.output.read_text())
    if arguments.plot:
        write_atomically(arguments.plot, plot(report))
        return
    pipeline = cast(TangoPipeline, load_generator(mini_folder("mini")))
    for done in measure(Bench(pipeline), report, arguments.policy, arguments.load, arguments.seconds):
        write_atomically(arguments.output, json.dumps(report, indent=1) + "\n")
        print(done, flush=True)


if __name__ == "__main__":
    main()
