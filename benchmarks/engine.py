"""What the engine gains and costs on this machine, as ratios within one run.

    python -m benchmarks.engine [--model mini|tiny] [--clips 8] [--rounds 3] [--output FILE]

Measured: eight requests at once against one after another; a denoising step through the engine against the
bare denoiser call of the same shape; a lone request with `exact` against one without; one clip at the default
settings. Both sides of a ratio are measured in turns, and medians are taken: a busy machine spoils neither.
"""

import argparse
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import PROMPT, seconds, write_report
from services.api.generation import GenerationRequest, Progress
from services.engine import Engine, EngineConfig
from services.models.architectures import load_generator
from services.models.latent import LatentPipeline, clip_generator
from services.models.mini import mini_folder

STEPS_A_ROUND = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One ratio."""

    name: str
    """What was compared: `of` over `to`."""
    of: float
    """Seconds of the first."""
    to: float
    """Seconds of the second."""

    @property
    def ratio(self) -> float:
        """How many times longer the first takes."""
        return self.of / self.to


def main() -> None:
    """Measure, print a table, write the JSON file."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    pipeline = _load(arguments.model, arguments.device)
    # The places of one call, even where more clips are asked for than the default has.
    config = EngineConfig(threads=arguments.threads, max_queue=max(64, arguments.clips))
    with Engine(pipeline, config) as engine:
        request = engine.request(PROMPT, seed=0, num_inference_steps=arguments.steps)
        engine.generate(request)  # The first call of a shape allocates and chooses kernels.
        lone = median(seconds(lambda: engine.generate(request)) for _ in range(arguments.rounds))
        figures = [
            _batching(engine, request, arguments.clips, arguments.rounds),
            _overhead(engine, request, clips=1, rounds=arguments.rounds),
            _overhead(engine, request, clips=8, rounds=arguments.rounds),
        ]
    figures.append(_exact(pipeline, config, request, arguments.rounds))
    report = _report(arguments, pipeline, request, lone, figures)
    _print(report, figures)
    write_report(arguments.output, report)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("mini", "tiny"), default="mini")
    parser.add_argument("--device", default="cpu", help="a device of PyTorch")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the model"
    )
    parser.add_argument("--clips", type=int, default=8, help="requests at once")
    parser.add_argument("--steps", type=int, help="denoising steps of each; the model's default if absent")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("build/bench/engine.json"))
    return parser.parse_args()


def _load(model: str, device: str) -> LatentPipeline:
    if model == "mini":
        return load_generator(mini_folder("mini"), device=device)
    from tests.tiny import tiny_pipeline  # only in a checkout

    pipeline = tiny_pipeline()
    pipeline.to(device)
    return pipeline


def _batching(engine: Engine, request: GenerationRequest, clips: int, rounds: int) -> Figure:
    requests = [replace(request, seed=seed) for seed in range(clips)]

    def one_after_another() -> None:
        for each in requests:
            engine.generate(each)

    def at_once() -> None:
        streams = [engine.stream(each) for each in requests]
        for stream in streams:
            for _ in stream:
                pass

    at_once()
    pairs = [(seconds(one_after_another), seconds(at_once)) for _ in range(rounds)]
    return Figure(
        name=f"{clips} requests one after another / at once",
        of=median(pair[0] for pair in pairs),
        to=median(pair[1] for pair in pairs),
    )


def _overhead(engine: Engine, request: GenerationRequest, *, clips: int, rounds: int) -> Figure:
    """A step of the engine, schedulers and events included, over the bare call of the same rows."""
    guided = replace(request, clip_count=clips, guidance_scale=3.0, num_inference_steps=STEPS_A_ROUND)
    bare_call = _bare_call(engine.pipeline, guided)
    in_engine: list[float] = []
    bare: list[float] = []
    for _ in range(rounds):
        bare += [seconds(bare_call) for _ in range(STEPS_A_ROUND)]
        in_engine += _step_seconds(engine, guided)
    return Figure(
        name=f"engine step / bare denoiser call (clips: {clips})",
        of=median(in_engine),
        to=median(bare),
    )


def _step_seconds(engine: Engine, request: GenerationRequest) -> Iterator[float]:
    times = [time.perf_counter() for event in engine.stream(request) if isinstance(event, Progress)]
    return (after - before for before, after in pairwise(times))


def _bare_call(pipeline: LatentPipeline, request: GenerationRequest) -> Callable[[], None]:
    clips = request.clip_count
    noise_1X = pipeline.noise(request.duration, clip_generator(request.seed))
    latents_BX = noise_1X.repeat(2 * clips, *[1] * (noise_1X.ndim - 1))
    timesteps_B = torch.full((2 * clips,), 500.0, device=pipeline.device)
    seconds_B = torch.full((2 * clips,), request.duration, device=pipeline.device)
    length = pipeline.text_length(request.prompt)
    text = pipeline.encode(["", request.prompt], length=length).repeat_interleave(clips)
    on_gpu = pipeline.device.type == "cuda"

    def call() -> None:
        with torch.inference_mode():
            pipeline.predict(latents_BX, timesteps_B, text, seconds_B)
            if on_gpu:
                torch.cuda.synchronize()

    call()
    return call


def _exact(pipeline: LatentPipeline, config: EngineConfig, request: GenerationRequest, rounds: int) -> Figure:
    pairs = []
    for _ in range(rounds):
        both = []
        for exact in (True, False):
            with Engine(pipeline, config.model_copy(update={"exact": exact})) as engine:
                engine.generate(replace(request, num_inference_steps=1))
                both.append(seconds(lambda engine=engine: engine.generate(request)))  # type: ignore[misc]
        pairs.append(both)
    return Figure(
        name="a lone request with `exact` / without",
        of=median(pair[0] for pair in pairs),
        to=median(pair[1] for pair in pairs),
    )


def _report(
    arguments: argparse.Namespace,
    pipeline: LatentPipeline,
    request: GenerationRequest,
    lone: float,
    figures: list[Figure],
) -> dict[str, object]:
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "model": arguments.model,
        "device": str(pipeline.device),
        "threads": arguments.threads,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "duration_seconds": request.duration,
        "num_inference_steps": request.num_inference_steps,
        "scheduler": request.scheduler,
        "one_clip_seconds": lone,
        "peak_memory_mib": peak,
        "ratios": [{**asdict(figure), "ratio": figure.ratio} for figure in figures],
    }


def _print(report: dict[str, object], figures: list[Figure]) -> None:
    settings = f"{report['model']} on {report['device']}, {report['threads']} threads"
    clip = f"{report['duration_seconds']} s, {report['num_inference_steps']} steps of {report['scheduler']}"
    table = Table(title=f"Engine: {settings}")
    for column in ("ratio of", "first, s", "second, s", "ratio"):
        table.add_column(column, justify="left" if column == "ratio of" else "right")
    for figure in figures:
        table.add_row(figure.name, f"{figure.of:.4g}", f"{figure.to:.4g}", f"{figure.ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(f"one clip ({clip}): {report['one_clip_seconds']:.2f} s; peak memory: "
                  f"{report['peak_memory_mib']:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
