"""Quality against cost: steps and schedulers of a model, and each model's profiles, by the independent judge.

    python -m benchmarks.quality_cost --prompts 100                                       # the teacher
    python -m benchmarks.quality_cost --prompts 100 --model mini --model file:build/distill/mini-student
    python -m benchmarks.quality_cost --prompts 500 --seeds 2 --split test --point mini:jump:2

Each point is written to `--output` when it is measured, the cheapest first; the same command resumes, and
`--minutes` stops it. `--plot` draws the points that there are. All points have the same prompts and seeds.
FAD needs equal numbers of clips, so those of other runs can't be compared.
"""

import argparse
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measuring import machine, versions
from services.errors import invalid
from services.files import write_atomically
from services.models.architectures import load_generator
from services.models.audio_pipeline import AudioPipeline
from services.models.latent import clip_generator, guided_steps
from services.models.tango.distilled import STARTS
from services.weights.uri import ModelURI, resolve
from training.evaluation.distances import (
    KAD_SCALE,
    Gaussian,
    frechet_distance,
    gaussian_kernel,
    median_bandwidth,
    squared_mmd,
)
from training.evaluation.embedders import Embedder, Loader, Sound, TaggerEmbedder, load_tagger
from training.evaluation.events import compare_events, event_metrics
from training.evaluation.prompts import Prompt, world_prompts
from training.objectives.statistics import mean_interval
from training.soundworld.scenes import Split

STEPS: Final[tuple[int, ...]] = (1, 2, 4, 5, 8, 10, 25, 50, 100, 200)
SCHEDULERS: Final[tuple[str, ...]] = ("dpmsolver++", "unipc", "ddim", "ddpm")
BATCH: Final = 8
METRICS: Final = ("presence", "order_given_presence", "present_and_in_order")
OUTPUT: Final = Path("benchmarks/quality-cost.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A way to make clips."""

    model: str
    """URI of the model."""
    scheduler: str
    steps: int
    guidance: float
    stop: float = 1.0
    """Share of the steps after which guidance stops."""
    profile: str = ""
    """Name of the profile with these settings."""

    @property
    def key(self) -> str:
        """Return its name in the report."""
        stop = f":{self.stop:g}" if self.stop < 1 else ""
        return f"{self.model}:{self.scheduler}:{self.steps}:{self.guidance:g}{stop}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Panel:
    """The prompts, the judge, and the embeddings of the rendered references."""

    prompts: tuple[Prompt, ...]
    seeds: int
    judge: TaggerEmbedder
    embedders: Mapping[str, Embedder]
    references: Mapping[str, Any]
    """Embeddings [N, D] by embedder."""


def open_panel(count: int, seeds: int, split: Split) -> Panel:
    """Load the judge, and embed the references."""
    prompts, judge = world_prompts(count, split), load_tagger("mini:tagger")
    embedders: dict[str, Embedder] = {"tagger": judge, "clap": Loader("cpu").embedder("clap:mini:clap-b")}
    sounds = [Sound(*prompt.reference.read()) for prompt in prompts if prompt.reference is not None]
    references = {name: _embed(embedder, sounds) for name, embedder in embedders.items()}
    return Panel(prompts=prompts, seeds=seeds, judge=judge, embedders=embedders, references=references)


def measure(point: Point, pipeline: AudioPipeline, panel: Panel) -> dict[str, Any]:
    """Return the figures of a point: quality, and cost per clip."""
    described = pipeline.description
    wall, processor = time.perf_counter(), time.process_time()
    sounds: list[Sound] = []
    for seed in range(panel.seeds):
        for start in range(0, len(panel.prompts), BATCH):
            part = panel.prompts[start : start + BATCH]
            output = pipeline(
                [prompt.text for prompt in part],
                num_inference_steps=point.steps,
                guidance_scale=point.guidance,
                guidance_stop=point.stop,
                scheduler=point.scheduler,
                generator=[clip_generator(seed, start + number) for number in range(len(part))],
            )
            sounds += [Sound(waveform, output.sampling_rate) for waveform in output.audios]
    clips = len(sounds)
    cost = {
        "wall_seconds": (time.perf_counter() - wall) / clips,
        "processor_seconds": (time.process_time() - processor) / clips,
        "denoiser_rows": point.steps
        + guided_steps(point.guidance, point.stop, point.steps, folded=pipeline.folds_guidance),
    }
    numbers = np.tile(np.arange(len(panel.prompts)), panel.seeds)
    rows = [
        event_metrics(compare_events(truth, found, described.defaults.duration))
        for number, found in zip(numbers, panel.judge.detect(sounds), strict=True)
        if (truth := panel.prompts[number].truth) is not None
    ]
    quality: dict[str, Any] = {}
    for name in METRICS:
        values = np.array([row[name] for row in rows])
        kept = np.isfinite(values)
        interval = mean_interval(values[kept].tolist(), numbers[kept].tolist())
        quality[name] = [round(value, 4) for value in (interval.value, interval.low, interval.high)]
    for name, embedder in panel.embedders.items():
        embedded, reference = _embed(embedder, sounds), panel.references[name]
        quality[f"fad.{name}"] = frechet_distance(Gaussian.fit(embedded), Gaussian.fit(reference))
        quality[f"kad.{name}"] = _kad(embedded, reference, numbers)
    return {**asdict(point), **quality, **cost, "clips": clips, "date": date.today().isoformat()}


def _embed(embedder: Embedder, sounds: Sequence[Sound]) -> Any:
    parts = [embedder.embed(sounds[start : start + BATCH]) for start in range(0, len(sounds), BATCH)]
    return np.concatenate([part.embeddings_BD for part in parts]).astype(np.float64)


def _kad(embedded: Any, reference: Any, numbers: Any) -> float:
    bandwidth = median_bandwidth(reference)
    kernels = [
        gaussian_kernel(first, second, bandwidth)
        for first, second in ((embedded, embedded), (reference, reference), (embedded, reference))
    ]
    groups = np.arange(len(reference))
    return KAD_SCALE * squared_mmd(*kernels, groups_N=numbers, groups_M=groups)


def points_of(model: str, pipeline: AudioPipeline, steps: Sequence[int]) -> Iterator[Point]:
    """Yield the points of a model: its profiles, and each number of steps by each of its schedulers."""
    defaults, limits = pipeline.description.defaults, pipeline.description.limits
    for one in defaults.profiles:
        yield Point(
            model=model,
            scheduler=one.scheduler,
            steps=one.num_inference_steps,
            guidance=one.guidance_scale,
            stop=one.guidance_stop,
            profile=one.name,
        )
    known = [name for name in SCHEDULERS if name in limits.schedulers] or list(limits.schedulers)
    for scheduler in known:
        for count in sorted(STARTS) if pipeline.folds_guidance else steps:
            yield Point(model=model, scheduler=scheduler, steps=count, guidance=defaults.guidance_scale)


def read_point(text: str, pipelines: Mapping[str, AudioPipeline]) -> Point:
    """Return the point MODEL:SCHEDULER:STEPS[:GUIDANCE[:STOP]]. Raises `InvalidInputError`."""
    model = next((name for name in pipelines if text.startswith(f"{name}:")), None)
    parts = text.removeprefix(f"{model}:").split(":")
    if model is None or len(parts) not in (2, 3, 4) or not parts[1].isdecimal():
        form = "MODEL:SCHEDULER:STEPS, …:GUIDANCE or …:GUIDANCE:STOP, of a --model"
        raise invalid("--point", f"is {text!r}, must be {form}")
    scheduler, steps, *rest = parts
    guidance = float(rest[0]) if rest else pipelines[model].description.defaults.guidance_scale
    stop = float(rest[1]) if rest[1:] else 1.0
    return Point(model=model, scheduler=scheduler, steps=int(steps), guidance=guidance, stop=stop)


def plot(points: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the plot of quality against denoiser rows, a line per model and scheduler; PNG."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in points:
        lines.setdefault((point["model"], point["scheduler"]), []).append(point)
    panels = (("present_and_in_order", "present and in order"), ("fad.tagger", "FAD (tagger)"))
    for axis, (metric, label) in zip(axes, panels, strict=True):
        for (model, scheduler), group in lines.items():
            group.sort(key=lambda point: point["denoiser_rows"])
            values = [
                point[metric][0] if isinstance(point[metric], list) else point[metric] for point in group
            ]
            rows = [point["denoiser_rows"] for point in group]
            axis.plot(rows, values, marker="o", markersize=3, label=f"{Path(model).name} {scheduler}")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("denoiser rows per clip")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return file.getvalue()


def main() -> None:
    """Measure the points that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="model URI; default: mini")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--point", action="append", help="MODEL:SCHEDULER:STEPS[:GUIDANCE[:STOP]]; not all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no point after that")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--plot", type=Path, help="draw the points into this PNG file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    settings = {"prompts": arguments.prompts, "seeds": arguments.seeds, "split": arguments.split}
    report: dict[str, Any] = {
        "settings": settings,
        "machine": machine(),
        "versions": versions("torch", "diffusers"),
        "points": {},
    }
    if arguments.output.exists():
        report = json.loads(arguments.output.read_text())
        if report["settings"] != settings:
            parser.error(
                f"{arguments.output} is of {report['settings']}, not {settings}; give another --output"
            )
    pipelines: dict[str, AudioPipeline] = {}
    for model in arguments.model or ["mini"]:
        folder = resolve(ModelURI.parse(model)).folder
        pipelines[model] = cast(AudioPipeline, load_generator(folder))
        pipelines[model].set_progress_bar_config(disable=True)
    points = [
        point
        for model, pipeline in pipelines.items()
        for point in points_of(model, pipeline, arguments.steps)
    ]
    if arguments.point:
        points = [read_point(text, pipelines) for text in arguments.point]
    points.sort(key=lambda point: point.steps)
    panel = None
    for point in points:
        known = report["points"].get(point.key)
        if known is not None and (known["profile"] or not point.profile):
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        panel = panel or open_panel(arguments.prompts, arguments.seeds, arguments.split)
        found = (
            {**known, "profile": point.profile} if known else measure(point, pipelines[point.model], panel)
        )
        report["points"][point.key] = found
        write_atomically(arguments.output, json.dumps(report, indent=1) + "\n")
        print(point.key, found["present_and_in_order"], round(found["fad.tagger"], 3), flush=True)
    if arguments.plot:
        write_atomically(arguments.plot, plot(list(report["points"].values())))


if __name__ == "__main__":
    main()
