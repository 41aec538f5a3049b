"""Seconds per clip on a CPU: upstream's way against the profiles, at Tango 2's full size and on `mini`.

    python -m benchmarks.upstream [--threads 2] [--rounds 3] [--profiles mini]
    python -m benchmarks.upstream --only mini        # the other part of the report is kept

Upstream's way (`inference` and `encode_text_classifier_free` of its `models.py`, written again on the same
classes and libraries) is a plain loop in float32: 200 steps of DDPM, one clip at a time, prompt and empty
prompt encoded for each. Profiles are those of `--profiles`, models whose `model_index.json` has them; at
full size in bfloat16 as served with `--dtype bfloat16`, with the empty prompt from the cache.

Full size: released sizes, random weights. A clip is extrapolated: text, a step of each number of rows, and
decoding are measured, and all steps of as many rows cost the same. On `mini` clips are made from end to
end.

Shapes: R rows, X latents, N samples.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import torch
from torch import Generator, Tensor

from benchmarks.gpu import build
from benchmarks.measuring import PROMPT, machine, memory_mib, versions
from services.api.generation import Profile
from services.engine import Engine, EngineConfig
from services.files import write_atomically
from services.models.architectures import load_generator
from services.models.latent import Conditioning, guide, guided_steps
from services.models.tango.pipeline import TangoPipeline
from services.weights.uri import resolve

UPSTREAM_STEPS: Final = 200
GUIDANCE: Final = 3.0
MINI_THREADS: Final = 1
"""More make `mini` slower: its tensors are small."""
AT_ONCE: Final = 8
"""Requests that the engine has at once."""


# --------------------------------------------------------------------------------------------- upstream's way


def upstream_text(pipeline: TangoPipeline, prompt: str) -> Conditioning:
    """Encode the empty prompt, padded to the length of `prompt`, and `prompt`, as upstream does per call."""
    length = pipeline.token_count(prompt)
    return pipeline.encode(["", prompt], length=pipeline.config.text_length or length)


@torch.no_grad()
def upstream_clip(pipeline: TangoPipeline, prompt: str, steps: int, generator: Generator) -> Tensor:
    """Return the waveform [1, N] of a prompt."""
    duration = pipeline.config.default_duration
    text = upstream_text(pipeline, prompt)
    scheduler: Any = pipeline.make_scheduler("ddpm")
    scheduler.set_timesteps(steps)
    latents_1X = torch.randn((1, *pipeline.latent_shape(duration)), generator=generator)
    latents_1X = latents_1X * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        latents_RX = scheduler.scale_model_input(torch.cat([latents_1X] * 2), timestep)
        unconditional, conditional = pipeline.predict(latents_RX, timestep.expand(2), text).chunk(2)
        guided = guide(unconditional, conditional, GUIDANCE)
        latents_1X = scheduler.step(guided, timestep, latents_1X, generator=generator).prev_sample
    return pipeline.decode(latents_1X, round(duration * pipeline.config.sampling_rate))


# -------------------------------------------------------------------------------------------------- the clock


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Time of a call."""

    wall: float
    """Seconds."""
    processor: float
    """Seconds of all threads."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(wall=self.wall + other.wall, processor=self.processor + other.processor)

    def __mul__(self, times: float) -> "Cost":
        return Cost(wall=times * self.wall, processor=times * self.processor)


def cost(act: Callable[[], object], rounds: int) -> Cost:
    """Return the median cost of a call, after one that does not count."""
    found = []
    for _ in range(1 + rounds):
        wall, processor = time.perf_counter(), time.process_time()
        act()
        found.append((time.perf_counter() - wall, time.process_time() - processor))
    walls, processors = zip(*found[1:], strict=True)
    return Cost(wall=median(walls), processor=median(processors))


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to make a clip: the steps that are guided take two rows, the others one."""

    name: str
    steps: int
    guided: int


def ways_of(model: str) -> Iterator[tuple[Way, Profile]]:
    """Yield the profiles of a model."""
    pipeline = load_generator(resolve(model).folder)
    for one in pipeline.description.defaults.profiles:
        steps = pipeline.steps(one.num_inference_steps, pipeline.description.defaults.duration)
        guided = guided_steps(one.guidance_scale, one.guidance_stop, steps, folded=pipeline.folds_guidance)
        yield Way(name=f"{Path(model).name}: {one.name}", steps=steps, guided=guided), one


# -------------------------------------------------------------------------------------------------- full size


def full_size(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the costs of the parts, and of a clip by each way."""
    torch.set_num_threads(arguments.threads)
    rounds, tiny = arguments.rounds, arguments.tiny
    ways = [way for model in arguments.profiles for way, _ in ways_of(model)]
    upstream = Way(name="upstream", steps=arguments.upstream_steps, guided=arguments.upstream_steps)
    parts: dict[str, Cost] = {}
    clips: dict[str, Cost] = {}
    peaks: dict[str, float] = {}
    for name, dtype, those in (("float32", torch.float32, [upstream]), ("bfloat16", torch.bfloat16, ways)):
        pipeline = build(torch.device("cpu"), dtype, tiny=tiny)
        pipeline.vae.float()
        pipeline.vocoder.float()
        pipeline.register_to_config(text_length=None)  # as in the released model
        latents_1X = torch.randn(1, *pipeline.latent_shape(pipeline.config.default_duration))
        plain = those == [upstream]
        length = pipeline.token_count(PROMPT) if plain else pipeline.text_length(PROMPT)
        prompts = ["", PROMPT] if plain else [PROMPT]
        text = cost(partial(pipeline.encode, prompts, length=length), rounds)
        rows = {count: cost(partial(_step, pipeline, latents_1X, count, length), rounds) for count in (2, 1)}
        decode = cost(partial(pipeline.decode, latents_1X), rounds)
        parts |= {f"{name}: text": text, f"{name}: decoding": decode}
        parts |= {f"{name}: a step of {count} rows": one for count, one in rows.items()}
        for way in those:
            denoise = rows[2] * way.guided + rows[1] * (way.steps - way.guided)
            clips[way.name] = text + denoise + decode
        peaks[name] = round(memory_mib()["VmHWM"])
        del pipeline
    return {
        "threads": arguments.threads,
        "parts": {name: asdict(one) for name, one in parts.items()},
        "clips": _compared([upstream, *ways], clips),
        "peak MiB so far": peaks,
    }


def _step(pipeline: TangoPipeline, latents_1X: Tensor, rows: int, length: int) -> None:
    """Make a denoising step of a clip with `rows` rows and `length` tokens, the scheduler's part included."""
    scheduler: Any = pipeline.make_scheduler("ddim")
    scheduler.set_timesteps(10)
    text = _random_text(rows, length, pipeline.text_encoder.config.hidden_size)
    timestep = scheduler.timesteps[0]
    output_RX = pipeline.predict(latents_1X.expand(rows, *latents_1X.shape[1:]), timestep.expand(rows), text)
    if rows == 2:
        output_RX = guide(output_RX[:1], output_RX[1:], GUIDANCE)
    scheduler.step(output_RX, timestep, latents_1X)


def _random_text(rows: int, length: int, width: int) -> Conditioning:
    embeds, mask = torch.randn(rows, length, width), torch.ones(rows, length, dtype=torch.bool)
    return Conditioning(tensors={"embeds": embeds, "mask": mask})


def _compared(ways: Sequence[Way], clips: Mapping[str, Cost]) -> dict[str, dict[str, float]]:
    """Return the seconds per clip of each way, and how many times faster than the first it is."""
    first = clips[ways[0].name]
    return {
        way.name: {
            "steps": way.steps,
            "denoiser rows": way.steps + way.guided,
            "seconds per clip": round(clips[way.name].wall, 4),
            "processor seconds per clip": round(clips[way.name].processor, 4),
            "times faster": round(first.wall / clips[way.name].wall, 2),
        }
        for way in ways
    }


# ------------------------------------------------------------------------------------------------------- mini


def end_to_end(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds per clip on `mini`: upstream's way, and each profile alone and several at once."""
    torch.set_num_threads(MINI_THREADS)
    rounds = arguments.rounds
    found: dict[str, Cost] = {}
    pipeline = cast(TangoPipeline, load_generator(resolve("mini").folder))
    ways = [Way(name="upstream", steps=arguments.upstream_steps, guided=arguments.upstream_steps)]
    found["upstream"] = cost(
        lambda: upstream_clip(pipeline, PROMPT, arguments.upstream_steps, torch.Generator().manual_seed(0)),
        rounds,
    )
    at_once: dict[str, float] = {}
    for model in arguments.profiles:
        served = load_generator(resolve(model).folder)
        with Engine(served, EngineConfig(threads=MINI_THREADS)) as engine:
            for way, profile in ways_of(model):
                ways.append(way)
                alone = partial(_generate, engine, profile.name, 1)
                together = partial(_generate, engine, profile.name, AT_ONCE)
                found[way.name] = cost(alone, rounds)
                at_once[way.name] = round(found["upstream"].wall * AT_ONCE / cost(together, rounds).wall, 2)
    compared = _compared(ways, found)
    for name, times in at_once.items():
        compared[name][f"times faster, {AT_ONCE} at once"] = times
    return {"threads": MINI_THREADS, "clips": compared}


def _generate(engine: Engine, profile: str, count: int) -> None:
    requests = [engine.request(PROMPT, profile=profile, seed=seed) for seed in range(count)]
    for stream in [engine.stream(request) for request in requests]:
        for _ in stream:
            pass


# ------------------------------------------------------------------------------------------------- the report

PARTS: Final[Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "mini": end_to_end,
    "full size": full_size,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write each part as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the full-size model")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of which the median counts")
    parser.add_argument("--profiles", nargs="+", default=["mini"], help="models whose profiles are taken")
    parser.add_argument("--upstream-steps", type=int, default=UPSTREAM_STEPS)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of full size: a test")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/upstream.json"))
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {}
    if arguments.output.exists():
        report = json.loads(arguments.output.read_text())
    for name, measure in PARTS.items():
        if arguments.only not in (None, name):
            continue
        report[name] = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "versions": versions("torch", "diffusers", "transformers"),
            **measure(arguments),
        }
        write_atomically(arguments.output, json.dumps(report, indent=1) + "\n")
        print(f"{name}: {json.dumps(report[name], indent=1)}", flush=True)


if __name__ == "__main__":
    main()
