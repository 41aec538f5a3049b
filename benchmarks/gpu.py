"""Speed of a full-size Tango 2 on a GPU, in the few minutes for which one is borrowed.

    python -m benchmarks.gpu [--minutes 8] [--output benchmarks/gpu.json] [--only NAME …] [--fresh]
    python -m benchmarks.gpu --tiny          # every measurement on a tiny model, on any machine: a test

The model has the released sizes and random weights, built on the device. Measurements run in order of
importance. Each is written to the JSON file as soon as it is there; a second run on the same card with the
same versions skips those, and one with fewer minutes stops between two measurements. ``gpu.md`` next to the
JSON file is its page.

A machine that has torch and transformers needs the wheels of `PACKAGES` as well:

    pip download --no-deps --dest .gpu-wheels diffusers==0.42.0 …          # here; versions as in uv.lock
    pip install --no-deps --no-index .gpu-wheels/*.whl                     # there

int8 and fp8 need torchao, too (0.18.0 for torch 2.13); without it the report says that they were skipped.

Shapes: R rows of a denoiser call (two per guided clip), X the latents' shape, N samples.
"""

# ruff: noqa: E402

import argparse
import importlib.util
import json
import platform
import queue
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

PACKAGES: Final = ("diffusers", "peft", "pydantic", "accelerate", "soundfile", "scipy", "google.rpc")
"""Modules that a machine with torch and transformers may lack."""


def _missing() -> list[str]:
    """Return the modules of `PACKAGES` that are not installed."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in PACKAGES if not found(name)]


if _missing():
    sys.exit(f"not installed here: {', '.join(_missing())}; see the head of {__file__} for how to carry them")

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from benchmarks.arrivals import Server, batch_server, engine_server, latencies, poisson
from benchmarks.deep_features import DeepFeatures
from benchmarks.gpu_peers import PEERS
from services.api.generation import Event, Failed, Finished, GenerationRequest
from services.engine import Engine, EngineConfig
from services.models.latent import Conditioning, clip_generator, guide
from services.models.tango.checkpoint import HIFIGAN_CONFIG, UNET_CONFIG
from services.models.tango.pipeline import TangoPipeline, velocity
from services.models.tango.schedulers import make_scheduler
from training.objectives.diffusion import diffusion_dpo

PROMPT: Final = "a dog barks then a siren wails"
STEPS: Final = (25, 8, 2)
GUIDANCE: Final = 3.0
DENSE_BF16: Final = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Peak of dense bfloat16 in FLOP/s by card (NVIDIA's data sheets, SXM), by which MFU is computed."""
TEXT_TOKENS: Final = 32
"""Fixed padded length of prompts, so that one graph fits all of them."""


# ------------------------------------------------------------------------------------------------- the model


def build(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> TangoPipeline:
    """Return a Tango pipeline of the released sizes (or tiny ones) with random weights on `device`."""
    torch.manual_seed(0)
    unet = dict(UNET_CONFIG)
    text = {
        "d_model": 1024,
        "d_ff": 2816,
        "num_layers": 24,
        "num_heads": 16,
        "feed_forward_proj": "gated-gelu",
    }
    channels, width = (128, 256, 512), 1024
    if tiny:
        unet |= {"block_out_channels": [32, 32, 32, 32], "attention_head_dim": [2] * 4, "norm_num_groups": 8}
        unet |= {"cross_attention_dim": 16, "layers_per_block": 1}
        text |= {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
        channels, width = (8, 8, 8), 32
    tokenizer = _tokenizer()
    with torch.device(device):
        pipeline = TangoPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(
                T5Config(**{"d_kv": 64, "vocab_size": 32_128, "feed_forward_proj": "gated-gelu", **text})
            ),
            unet=UNet2DConditionModel.from_config(unet),
            vae=AutoencoderKL(
                in_channels=1,
                out_channels=1,
                latent_channels=8,
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                layers_per_block=2,
                norm_num_groups=8 if tiny else 32,
                scaling_factor=0.92,
            ),
            vocoder=SpeechT5HifiGan(
                SpeechT5HifiGanConfig(
                    **HIFIGAN_CONFIG, model_in_dim=64, sampling_rate=16_000, upsample_initial_channel=width
                )
            ),
            scheduler=make_scheduler("ddpm"),
            default_scheduler="dpmsolver++",
            default_num_inference_steps=STEPS[0],
            text_length=TEXT_TOKENS,
            default_duration=1.28 if tiny else 10.24,
        )
    return pipeline.to(device, dtype)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: what a prompt says changes no cost."""
    words = ("<pad>", "</s>", "<unk>", *dict.fromkeys(PROMPT.split()))
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass
class Call:
    """A denoiser call of a fixed number of rows, with fixed addresses, eager or as a CUDA graph."""

    pipeline: TangoPipeline
    rows: int
    graphed: bool
    latents_RX: Tensor = field(init=False)
    timesteps_R: Tensor = field(init=False)
    conditioning: Conditioning = field(init=False)
    shares: "Call | None" = None
    """Another call of as many rows, whose inputs this one takes."""
    features: DeepFeatures | None = None
    reusing: bool = False
    """Whether the call reuses the `features` of the last one that did not."""
    _graph: Any = None
    _output_RX: Tensor | None = None

    def __post_init__(self) -> None:
        if self.shares is None:
            self._allocate()
        else:
            self.latents_RX, self.timesteps_R = self.shares.latents_RX, self.shares.timesteps_R
            self.conditioning = self.shares.conditioning
        if self.graphed:
            self._capture()

    def _allocate(self) -> None:
        pipeline, device = self.pipeline, self.pipeline.device
        shape = pipeline.latent_shape(pipeline.config.default_duration)
        self.latents_RX = torch.randn((self.rows, *shape), device=device, dtype=pipeline.unet.dtype)
        self.timesteps_R = torch.full((self.rows,), 500, device=device)
        text = pipeline.encode([PROMPT], length=TEXT_TOKENS).to(device, pipeline.unet.dtype)
        self.conditioning = Conditioning(
            tensors={
                name: tensor.repeat(self.rows, *[1] * (tensor.ndim - 1)).contiguous()
                for name, tensor in text.tensors.items()
            }
        )

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output_RX = self._eager()

    @torch.no_grad()
    def _eager(self) -> Tensor:
        if self.features is not None:
            self.features.reusing = self.reusing
        return velocity(self.pipeline.unet, self.latents_RX, self.timesteps_R, self.conditioning)

    def __call__(self) -> Tensor:
        """Return v [R, X] of the inputs that the buffers hold."""
        if self._graph is None:
            return self._eager()
        self._graph.replay()
        assert self._output_RX is not None
        return self._output_RX


def render(call: Call, steps: int) -> Tensor:
    """Return the waveforms [B, N] of `call.rows` / 2 guided clips: a plain loop, encoding and decoding."""
    pipeline = call.pipeline
    return pipeline.decode(
        denoise([call], steps), pipeline.geometry.samples(pipeline.config.default_duration)
    )


def denoise(calls: Sequence[Call], steps: int) -> Tensor:
    """Return the clean latents [B, X] of guided clips, with the prompts' encoding.

    `calls` share their inputs, and take turns in the steps.
    """
    call = calls[0]
    pipeline, clips = call.pipeline, call.rows // 2
    duration = pipeline.config.default_duration
    text = pipeline.encode([PROMPT] * clips, length=TEXT_TOKENS).to(pipeline.device, pipeline.unet.dtype)
    for name, tensor in call.conditioning.tensors.items():
        tensor[clips:].copy_(text[name])
    noises = [pipeline.noise(duration, clip_generator(0, index)) for index in range(clips)]
    latents_BX = torch.cat(noises)
    scheduler = pipeline.make_scheduler("dpmsolver++")
    scheduler.set_timesteps(steps, device=pipeline.device)
    for step, timestep in enumerate(scheduler.timesteps):
        call.latents_RX[:clips].copy_(latents_BX)
        call.latents_RX[clips:].copy_(latents_BX)
        call.timesteps_R.fill_(timestep)
        unconditional, conditional = calls[step % len(calls)]().float().chunk(2)
        latents_BX = scheduler.step(guide(unconditional, conditional, GUIDANCE), timestep, latents_BX)[0]
    return latents_BX


# -------------------------------------------------------------------------------------------------- the bench


@dataclass
class Bench:
    """What the measurements share."""

    device: torch.device
    tiny: bool
    ends: float
    """When to stop, on the clock of `time.monotonic`."""
    pipelines: dict[torch.dtype, TangoPipeline] = field(default_factory=dict)
    flops_per_row: float = 0.0

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.ends - time.monotonic()

    @property
    def graphs(self) -> bool:
        """Whether there are CUDA graphs."""
        return self.device.type == "cuda"

    @property
    def peak(self) -> float | None:
        """Return the card's peak in FLOP/s; None if it is not known."""
        name = torch.cuda.get_device_name() if self.graphs else ""
        return next((peak for card, peak in DENSE_BF16.items() if card in name), None)

    def pipeline(self, dtype: torch.dtype = torch.bfloat16) -> TangoPipeline:
        """Return the model in `dtype`; only one is kept."""
        if dtype not in self.pipelines:
            self.pipelines.clear()
            self.empty()
            self.pipelines[dtype] = build(self.device, dtype, tiny=self.tiny)
        return self.pipelines[dtype]

    def empty(self) -> None:
        """Free cached memory of the device."""
        if self.graphs:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, act: Callable[[], object], rounds: int = 5) -> float:
        """Return the median wall-clock time of a call, after one that does not count."""
        taken = []
        for _ in range(1 + (1 if self.tiny else rounds)):
            self.wait()
            began = time.perf_counter()
            act()
            self.wait()
            taken.append(time.perf_counter() - began)
        return median(taken[1:])

    def wait(self) -> None:
        """Wait for the device."""
        if self.graphs:
            torch.cuda.synchronize()

    def memory_gib(self) -> float | None:
        """Return the peak of allocated memory since `empty`."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.graphs else None

    def flops(self, rows: int) -> float:
        """Return the counted FLOPs of a denoiser call."""
        if not self.flops_per_row:
            call = Call(self.pipeline(), 2, graphed=False)
            with FlopCounterMode(display=False) as counter:
                call()
            self.flops_per_row = counter.get_total_flops() / 2
        return rows * self.flops_per_row

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Return the share of the card's peak; None if the peak is not known."""
        return None if self.peak is None else round(flops / seconds / self.peak, 4)


Figures = Iterator[tuple[str, Mapping[str, Any]]]
"""Names and figures, each written as it comes."""


def one_clip(bench: Bench) -> Figures:
    """One clip of 10.24 s: float32, bfloat16, and bfloat16 with the denoiser as a CUDA graph."""
    variants: list[tuple[str, torch.dtype, bool]] = [("bfloat16", torch.bfloat16, False)]
    if bench.graphs:
        variants.append(("bfloat16, CUDA graph", torch.bfloat16, True))
    variants.append(("float32", torch.float32, False))
    for name, dtype, graphed in variants:
        pipeline = bench.pipeline(dtype)
        call = Call(pipeline, 2, graphed=graphed)
        latents_BX = torch.randn_like(call.latents_RX[:1])
        parts = {
            "denoiser_call_ms": 1e3 * bench.seconds(call),
            "encode_ms": 1e3 * bench.seconds(partial(pipeline.encode, [PROMPT], length=TEXT_TOKENS)),
            "decode_ms": 1e3 * bench.seconds(partial(pipeline.decode, latents_BX)),
        }
        clips = {f"seconds_{steps}_steps": bench.seconds(partial(render, call, steps)) for steps in STEPS}
        yield name, {**parts, **clips, "peak_gib": bench.memory_gib()}


def saturation(bench: Bench) -> Figures:
    """Denoiser calls of growing batches, and the clips per second that follow at 25, 8 and 2 steps."""
    pipeline = bench.pipeline()
    for rows in (2, 4) if bench.tiny else (2, 8, 16, 32, 64, 128):
        call = Call(pipeline, rows, graphed=bench.graphs)
        latents_BX = torch.randn_like(call.latents_RX[: rows // 2])
        seconds = bench.seconds(call, rounds=3)
        decode = bench.seconds(partial(pipeline.decode, latents_BX), rounds=3)
        rates = {
            f"clips_per_second_{steps}_steps": (rows // 2) / (steps * seconds + decode) for steps in STEPS
        }
        yield (
            f"{rows} rows",
            {
                "call_ms": 1e3 * seconds,
                "decode_ms": 1e3 * decode,
                "tflops_per_second": bench.flops(rows) / seconds / 1e12,
                "mfu": bench.mfu(bench.flops(rows), seconds),
                **rates,
                "peak_gib": bench.memory_gib(),
            },
        )
        del call
        bench.empty()


def exact(bench: Bench) -> Figures:
    """Whether companions with other steps and guidance change a bit of a clip, at one batch shape."""
    config = EngineConfig(batch_shapes=(4,), exact=True)
    with Engine(bench.pipeline(), config) as engine:
        request = engine.request(PROMPT, seed=1, num_inference_steps=8)
        alone = engine.generate(request).clips[0].waveform()
        others = [
            engine.request(PROMPT, seed=2, num_inference_steps=5, guidance_scale=1.0),
            engine.request(PROMPT, seed=3, num_inference_steps=11, guidance_scale=4.0),
        ]
        done: queue.SimpleQueue[Event] = queue.SimpleQueue()
        for other in others:
            engine.submit(other, done.put)
        accompanied = engine.generate(request).clips[0].waveform()
    yield (
        "companions",
        {
            "equal_bits": bool(np.array_equal(alone, accompanied)),
            "largest_difference": float(np.abs(alone - accompanied).max()),
        },
    )


def under_load(bench: Bench) -> Figures:
    """Latency under Poisson arrivals: the engine's step-level batches, whole batches, and one at a time."""
    pipeline, steps = bench.pipeline(), 2 if bench.tiny else STEPS[0]
    shapes = (1, 2) if bench.tiny else (1, 2, 4, 8, 16)
    window = 2.0 if bench.tiny else 15.0
    with Engine(pipeline, EngineConfig(batch_shapes=shapes, max_queue=4096)) as engine:
        request = engine.request(PROMPT, seed=0, num_inference_steps=steps)
        unloaded = bench.seconds(lambda: engine.generate(request), rounds=3)
        burst = 2 * shapes[-1]
        capacity = burst / _together(engine, request, burst)
        yield "step-level, unloaded", {"seconds": unloaded, "capacity_clips_per_second": capacity}
        for load in (0.5,) if bench.tiny else (0.8, 0.5, 0.95):
            if bench.left < 1.5 * window:
                return
            server = engine_server(engine, lambda index: replace(request, seed=index))
            found = latencies(poisson(load * capacity, window), server)
            yield f"step-level, load {load}", _quantiles(found)
    for name, largest in (("whole batches", shapes[-1]), ("one at a time", 1)):
        calls = {clips: Call(pipeline, 2 * clips, graphed=False) for clips in shapes if clips <= largest}
        for load in (0.5,) if bench.tiny else (0.8, 0.5):
            if bench.left < 1.5 * window:
                return
            found = latencies(poisson(load * capacity, window), _whole_batches(calls, steps))
            yield f"{name}, load {load} of the engine's capacity", _quantiles(found)


def _together(engine: Engine, request: GenerationRequest, count: int) -> float:
    """Return the seconds that `count` requests at once take, after a first round that does not count."""
    taken = 0.0
    for _ in range(2):
        done: queue.SimpleQueue[Event] = queue.SimpleQueue()
        began = time.perf_counter()
        for seed in range(count):
            engine.submit(replace(request, seed=seed), done.put)
        _wait_for(done, count)
        taken = time.perf_counter() - began
    return taken


def _wait_for(events: "queue.SimpleQueue[Event]", count: int) -> None:
    while count:
        event = events.get()
        if isinstance(event, Failed):
            raise event.error
        count -= isinstance(event, Finished)


def _quantiles(latencies_N: NDArray[np.float64]) -> dict[str, float]:
    p50, p95, p99 = np.quantile(latencies_N, (0.5, 0.95, 0.99))
    return {"requests": len(latencies_N), "p50": float(p50), "p95": float(p95), "p99": float(p99)}


def _whole_batches(calls: Mapping[int, Call], steps: int) -> Server:
    """Return a server that renders all waiting requests together, up to the largest call, to the end."""

    def render_all(indices: Sequence[int]) -> None:
        render(calls[min(size for size in calls if size >= len(indices))], steps).cpu()

    return batch_server(render_all, max(calls))


def dpo_step(bench: Bench) -> Figures:
    """A step of Diffusion-DPO, full and LoRA: float32 weights under bfloat16 autocast."""
    from peft import LoraConfig

    rank = 4 if bench.tiny else 64
    per_row = bench.flops(1)
    for name, adapters, checkpointing in (
        ("full", False, False),
        ("full, gradient checkpointing", False, True),
        ("LoRA", True, False),
    ):
        bench.pipelines.clear()
        bench.empty()
        reference = build(bench.device, torch.bfloat16, tiny=bench.tiny).unet
        policy = build(bench.device, torch.float32, tiny=bench.tiny).unet.train()
        if adapters:
            policy.requires_grad_(False)
            policy.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        else:
            policy.requires_grad_(True)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        for pairs in (1,) if bench.tiny else (4, 8, 16):
            yield f"{name}, {pairs} pairs", _dpo_figures(bench, policy, reference, pairs, per_row)
        del policy, reference
        bench.empty()


def _dpo_figures(
    bench: Bench,
    policy: UNet2DConditionModel,
    reference: UNet2DConditionModel,
    pairs: int,
    per_row: float,
) -> dict[str, Any]:
    """Return speed and memory of a step of `pairs` pairs; memory that is short is a figure too.

    Counted FLOPs: a forward pass of the reference and of the policy, and a backward pass of two forward ones.
    """
    learning = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=bench.graphs)
    width: int = policy.config.cross_attention_dim
    frames = 32 if bench.tiny else 256
    rows = 2 * pairs
    noisy = torch.randn(rows, 8, frames, 16, device=bench.device)
    timesteps = torch.randint(0, 1000, (rows,), device=bench.device)
    text = Conditioning(
        tensors={
            "embeds": torch.randn(rows, TEXT_TOKENS, width, device=bench.device),
            "mask": torch.ones(rows, TEXT_TOKENS, dtype=torch.bool, device=bench.device),
        }
    )

    def errors(model: nn.Module) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            predicted = velocity(model, noisy, timesteps, text)
        return (predicted.float() - noisy).square().flatten(1).mean(1)

    def step() -> None:
        with torch.no_grad():
            fixed = errors(reference)
        learned = errors(policy)
        loss = diffusion_dpo(learned[:pairs], learned[pairs:], fixed[:pairs], fixed[pairs:], beta=2000).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        seconds = bench.seconds(step, rounds=3)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    return {
        "seconds_a_step": seconds,
        "pairs_per_second": pairs / seconds,
        "mfu": bench.mfu(4 * rows * per_row, seconds),
        "peak_gib": bench.memory_gib(),
    }


def peers(bench: Bench) -> Figures:
    """diffusers' AudioLDM 2 and Stable Audio Open: one clip and batches of 25 steps, to the waveform."""
    for name, build_peer in PEERS.items():
        bench.pipelines.clear()
        bench.empty()
        render_peer = build_peer(bench.device, torch.bfloat16, tiny=bench.tiny)
        for clips in (1,) if bench.tiny else (1, 8, 32):
            steps = 2 if bench.tiny else STEPS[0]
            try:
                seconds = bench.seconds(partial(render_peer, clips, steps), rounds=2)
            except torch.OutOfMemoryError:
                yield f"{name}, {clips} clips", {"out_of_memory": True}
                break
            yield (
                f"{name}, {clips} clips",
                {
                    "steps": steps,
                    "seconds": seconds,
                    "clips_per_second": clips / seconds,
                    "peak_gib": bench.memory_gib(),
                },
            )
        del render_peer
        bench.empty()


QUANTISED: Final[Mapping[str, tuple[str, tuple[int, int]]]] = {
    "int8 linear layers": ("Int8DynamicActivationInt8WeightConfig", (8, 0)),
    "fp8 linear layers": ("Float8DynamicActivationFloat8WeightConfig", (8, 9)),
}
"""torchao's configurations, and the least compute capability of a GPU that multiplies such numbers."""


def cheaper_steps(bench: Bench) -> Figures:
    """Deep features reused in every second step, int8 and fp8, against bfloat16: time and error.

    The error is that of the clean latents after 25 steps against bfloat16, of random weights: it is rounding,
    and says nothing about sound. torchao's layers, and a row without them, have compiled transformer blocks.
    """
    shapes, steps = ((2,), 2) if bench.tiny else ((2, 16), STEPS[0])
    exact: dict[int, Tensor] = {}
    plain: dict[int, float] = {}

    def figures(name: str, calls: Sequence[Call]) -> tuple[str, Mapping[str, Any]]:
        rows = calls[0].rows
        seconds = sum(bench.seconds(call, rounds=3) for call in calls) / len(calls)
        clean_BX = denoise(calls, steps)
        found = {"call_ms": 1e3 * seconds, "speedup": plain.setdefault(rows, seconds) / seconds}
        error = (clean_BX - exact.setdefault(rows, clean_BX)).square().sum()
        if error:
            found["snr_db"] = float(10 * torch.log10(exact[rows].square().sum() / error))
        return f"{name}, {rows} rows", {**found, "peak_gib": bench.memory_gib()}

    pipeline = bench.pipeline()
    for rows in shapes:
        yield figures("bfloat16", [Call(pipeline, rows, graphed=bench.graphs)])
        features = DeepFeatures(pipeline.unet)
        with features.applied():
            whole = Call(pipeline, rows, bench.graphs, features=features)
            short = Call(pipeline, rows, bench.graphs, shares=whole, features=features, reusing=True)
            yield figures("deep features reused", [whole, short])
        del whole, short
        bench.empty()
    for name in ("blocks compiled", *QUANTISED):
        reason = _unfit(name, bench)
        if reason is not None:
            yield name, {"skipped": reason}
            continue
        bench.pipelines.clear()
        pipeline = bench.pipeline()
        if name in QUANTISED:
            _quantise(pipeline.unet, QUANTISED[name][0])
        if not bench.tiny:
            pipeline.unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
        for rows in shapes:
            yield figures(name, [Call(pipeline, rows, graphed=bench.graphs)])
            bench.empty()
    bench.pipelines.clear()


def _unfit(name: str, bench: Bench) -> str | None:
    """Return why a row can't be measured here; None if it can."""
    if name not in QUANTISED:
        return "a tiny model is not compiled" if bench.tiny else None
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    _, least = QUANTISED[name]
    if bench.graphs:
        capability = torch.cuda.get_device_capability()
        return f"compute capability {capability} is below {least}" if capability < least else None
    return "needs a GPU" if name.startswith("fp8") else None


def _quantise(unet: nn.Module, config: str) -> None:
    """Quantise the weights of the transformer blocks' linear layers, and their inputs in each call.

    Others see so few rows, as those of the timestep, that the products of int8 refuse them.
    """
    from torchao import quantization

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and ".transformer_blocks." in name

    quantization.quantize_(unet, getattr(quantization, config)(), filter_fn=fits)


MEASUREMENTS: Final[Mapping[str, tuple[Callable[[Bench], Figures], float]]] = {
    "one clip": (one_clip, 40.0),
    "saturation": (saturation, 60.0),
    "exact": (exact, 15.0),
    "DPO step": (dpo_step, 60.0),
    "under load": (under_load, 100.0),
    "peers": (peers, 90.0),
    "cheaper steps": (cheaper_steps, 120.0),
}
"""Measurements in order of importance, each with the seconds that it should be given."""


# ------------------------------------------------------------------------------------------------- the report


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing in the report, and write it and its page."""
    diffusers.logging.set_verbosity_error()  # no part is kept in float32, and it says so in every cast
    arguments = _arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("there is no GPU here; --tiny runs every measurement on a tiny model")
    report = _report(arguments, device)
    bench = Bench(device=device, tiny=arguments.tiny, ends=time.monotonic() + 60 * arguments.minutes)
    for name, (measure, seconds) in MEASUREMENTS.items():
        known = report["figures"].setdefault(name, {})
        if (arguments.only and name not in arguments.only) or known.get("complete"):
            continue
        if not arguments.tiny and bench.left < seconds:
            print(f"{name}: skipped, {bench.left:.0f} s are left of the {seconds:.0f} it needs")
            continue
        for figure, values in measure(bench):
            known[figure] = _rounded(values)
            print(f"{name}: {figure}: {json.dumps(known[figure])}", flush=True)
            _write(arguments.output, report)
        known["complete"] = True
        _write(arguments.output, report)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="start no measurement that takes longer")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/gpu.json"))
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, help="measurements to run")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: a test of this program")
    return parser.parse_args(argv)


def _report(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the report so far, or an empty one if it is of another card or of other versions."""
    head = {
        "card": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "tiny": arguments.tiny,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "cuda": torch.version.cuda,
    }
    if arguments.output.exists() and not arguments.fresh:
        known: dict[str, Any] = json.loads(arguments.output.read_text())
        if {key: known.get(key) for key in head} == head:
            return known
    return {**head, "date": date.today().isoformat(), "figures": {}}


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures with four significant digits."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()
    }


def _write(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    path.with_suffix(".md").write_text(page(report))


def page(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown: a table per measurement."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    size = "a tiny model: a test of the program" if report["tiny"] else "full size, random weights"
    head = f"{report['card']}, {size}; {report['date']}; {versions}, CUDA {report['cuda']}."
    parts = [f"# Speed on a GPU\n\n{head}\n"]
    for name, figures in report["figures"].items():
        rows = {key: values for key, values in figures.items() if key != "complete"}
        columns = list(dict.fromkeys(column for values in rows.values() for column in values))
        lines = [f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |"]
        lines.append(f"| --- |{' --- |' * len(columns)}")
        lines += [
            f"| {key} | {' | '.join(str(values.get(column, '')) for column in columns)} |"
            for key, values in rows.items()
        ]
        summary = (MEASUREMENTS[name][0].__doc__ or "").strip()
        parts.append(
            f"## {name.capitalize() if name[0].islower() else name}\n\n{summary}\n\n"
            + "\n".join(lines)
            + "\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
