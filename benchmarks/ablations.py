"""What each way to make a denoising step cheaper saves, and what it does to the clips: one switch each.

    python -m benchmarks.ablations [--prompts 100] [--rounds 15] [--only NAME …] [--output FILE]

On one thread, in processor time, each against the plain step of the same process in turns, on `mini` at 8
steps of `dpmsolver++` with guidance 3. A variant's clips are compared with the plain ones of the same seeds:
signal-to-noise ratio of the clean latents, and presence and order of the prompts' events by the independent
tagger. Also measured: schedulers called clip by clip, adapters, and decodes between two steps of a request.

Shapes: R rows of a denoiser call (two per guided clip), X the latents' shape.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.deep_features import DeepFeatures
from benchmarks.measuring import PROMPT, machine, versions, write_report
from services.api.generation import Clip, Event, Failed, Finished, Progress
from services.api.model import UNVERSIONED
from services.engine import Engine, EngineConfig
from services.models.architectures import load_generator
from services.models.latent import Conditioning, clip_generator
from services.models.lora import Adapter, LowRank, RowAdapters
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from services.models.tango.pipeline import TangoPipeline
from training.mini.evaluate import Sampling, evaluate_generation

STEPS: Final = 8
GUIDANCE: Final = 3.0
ROWS: Final = (2, 16)
"""Rows of the measured calls: one guided clip, and eight."""

Patch = Callable[[TangoPipeline], Any]
"""Returns a context in which the pipeline's steps are made in another way."""


# ------------------------------------------------------------------------------------------------- variants


@contextmanager
def bfloat16(pipeline: TangoPipeline) -> Iterator[None]:
    """Keep the denoiser in bfloat16; latents, guidance and the scheduler stay in float32."""
    weights = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.unet.to(torch.bfloat16)
    try:
        yield
    finally:
        pipeline.unet.to(torch.float32).load_state_dict(weights)


@contextmanager
def channels_last(pipeline: TangoPipeline) -> Iterator[None]:
    """Keep the denoiser's convolutions in the memory format channels last."""
    convert = cast(Any, pipeline.unet).to
    convert(memory_format=torch.channels_last)
    try:
        yield
    finally:
        convert(memory_format=torch.contiguous_format)


@contextmanager
def text_projections_cached(pipeline: TangoPipeline) -> Iterator[None]:
    """Compute the cross-attention's keys and values of a text once."""
    with ExitStack() as stack:
        for name, layer in pipeline.unet.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(("attn2.to_k", "attn2.to_v")):
                stack.enter_context(_forward(layer, _remembering(layer.forward)))
        yield


def _remembering(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    last: list[tuple[Tensor, Tensor]] = []

    def call(text_RLD: Tensor) -> Tensor:
        # A step's text is a copy of the last one's: equal, but another tensor.
        if not (last and last[0][0].shape == text_RLD.shape and torch.equal(last[0][0], text_RLD)):
            last[:] = [(text_RLD, forward(text_RLD))]
        return last[0][1]

    return call


@contextmanager
def guidance_interval(pipeline: TangoPipeline, *, first: int, last: int) -> Iterator[None]:
    """Compute the unconditional half in the steps `first` to `last` only (arXiv 2404.07724)."""
    predict = pipeline.predict

    def call(step: int, latents_RX: Tensor, timesteps_R: Tensor, text: Conditioning, *rest: Any) -> Tensor:
        if first <= step % STEPS <= last:
            return predict(latents_RX, timesteps_R, text, *rest)
        half = len(latents_RX) // 2
        conditional = Conditioning(tensors={name: tensor[half:] for name, tensor in text.tensors.items()})
        output = predict(latents_RX[half:], timesteps_R[half:], conditional)
        return torch.cat([output, output])

    with _counted(pipeline, call):
        yield


@contextmanager
def deep_features_reused(pipeline: TangoPipeline) -> Iterator[None]:
    """Compute all but the outermost blocks in every second step only (DeepCache, arXiv 2312.00858)."""
    features, predict = DeepFeatures(pipeline.unet), pipeline.predict

    def call(step: int, *inputs: Any) -> Tensor:
        features.reusing = step % STEPS % 2 == 1
        return predict(*inputs)

    with features.applied(), _counted(pipeline, call):
        yield


@contextmanager
def _counted(pipeline: TangoPipeline, call: Callable[..., Tensor]) -> Iterator[None]:
    """Have `call` called with the number of the step, from 0, in place of `predict`."""
    steps = iter(range(10**9))
    pipeline.predict = lambda *inputs: call(next(steps), *inputs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipeline.predict


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


VARIANTS: Final[Mapping[str, Patch]] = {
    "plain": lambda _: nullcontext(),
    "text projections cached": text_projections_cached,
    "channels last": channels_last,
    "bfloat16 denoiser": bfloat16,
    "guidance in steps 1 to 4 of 8": partial(guidance_interval, first=0, last=3),
    "guidance in steps 2 to 6 of 8": partial(guidance_interval, first=1, last=5),
    "guidance in steps 3 to 8 of 8": partial(guidance_interval, first=2, last=7),
    "deep features reused": deep_features_reused,
}


# ------------------------------------------------------------------------------------------------- measures


def variants(pipeline: TangoPipeline, rounds: int, prompts: int) -> dict[str, Any]:
    """Return the cost of each variant relative to the plain step, and what becomes of the clips."""
    tagger = EventTagger.from_pretrained(mini_folder("tagger")).float().eval()
    clean = {name: _clean(pipeline, patch) for name, patch in VARIANTS.items()}
    figures: dict[str, Any] = {}
    for name, patch in VARIANTS.items():
        costs = {f"cost at {rows} rows": _relative(pipeline, patch, rows, rounds) for rows in ROWS}
        with patch(pipeline):
            judged = evaluate_generation(
                pipeline, tagger, prompts=prompts, seeds=1,
                sampling=Sampling(num_inference_steps=STEPS, guidance_scale=GUIDANCE),
            )  # fmt: skip
        figures[name] = {**costs, "snr_db": _snr(clean["plain"], clean[name]), "judged": judged}
        print(name, {key: value for key, value in figures[name].items() if key != "judged"}, flush=True)
    return figures


def _render(pipeline: TangoPipeline, prompts: Sequence[str]) -> Tensor:
    """Return the clean latents of the prompts."""
    output = pipeline(
        list(prompts), num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
        generator=[clip_generator(seed) for seed in range(len(prompts))],
    )  # fmt: skip
    return cast(Tensor, output.audios)


def _clean(pipeline: TangoPipeline, patch: Patch) -> Tensor:
    with patch(pipeline):
        return _render(pipeline, [PROMPT, "rain falls", "a bell rings while a bird sings", "a cat meows"])


def _snr(plain: Tensor, other: Tensor) -> float | None:
    """Return the ratio of signal to difference in dB; None if there is no difference."""
    error = float((plain - other).square().sum())
    return 10 * torch.log10(plain.square().sum() / error).item() if error else None


def _relative(pipeline: TangoPipeline, patch: Patch, rows: int, rounds: int) -> float:
    """Return the processor time of a render of `STEPS` steps relative to the plain one, in turns."""
    prompts = [PROMPT] * (rows // 2)

    def cost(chosen: Patch) -> float:
        with chosen(pipeline):
            start = time.process_time()
            _render(pipeline, prompts)
            return time.process_time() - start

    pairs = [(cost(VARIANTS["plain"]), cost(patch)) for _ in range(rounds + 1)][1:]
    return median(other / plain for plain, other in pairs)


class _Operations(TorchDispatchMode):
    """Counts operations on more than single numbers, but for views: each is a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(result, Tensor) and result.numel() > 1:
            self.counts[str(func)] += 1
        return result


def schedulers(pipeline: TangoPipeline, rounds: int, prompts: int) -> dict[str, Any]:
    """Return what diffusers' schedulers, one per clip, cost: processor time and operations of a step."""
    latents_1X = pipeline.noise(2.56, clip_generator(0))
    output_1X = torch.randn_like(latents_1X)
    step = {rows: median(_call_times(pipeline, rows, rounds)) for rows in ROWS}
    with _Operations() as forward:
        _call(pipeline, 2)
    figures: dict[str, Any] = {"denoiser_operations": forward.counts.total()}
    for name in pipeline.description.limits.schedulers:
        times: list[float] = []
        operations = 0
        for _ in range(rounds):
            solver, generator = pipeline.solver(name, STEPS), clip_generator(0)
            x_1X = latents_1X
            for index in range(len(solver.timesteps)):
                start = time.process_time()
                x_1X = solver.step(output_1X, index, x_1X, generator)
                times.append(time.process_time() - start)
        solver, generator = pipeline.solver(name, STEPS), clip_generator(0)
        with _Operations() as counted:
            for index in range(len(solver.timesteps)):
                solver.step(output_1X, index, latents_1X, generator)
        operations = counted.counts.total() // len(solver.timesteps)
        figures[name] = {
            "microseconds": 1e6 * median(times),
            "operations": operations,
            **{f"share of a step at {rows} rows": rows / 2 * median(times) / step[rows] for rows in ROWS},
        }
    return figures


def _call(pipeline: TangoPipeline, rows: int) -> None:
    latents_RX = torch.zeros(rows, *pipeline.latent_shape(2.56))
    text = pipeline.encode(["", PROMPT], length=pipeline.text_length(PROMPT)).repeat_interleave(rows // 2)
    pipeline.predict(latents_RX, torch.full((rows,), 500.0), text)


def _call_times(pipeline: TangoPipeline, rows: int, rounds: int) -> Iterator[float]:
    for _ in range(rounds + 1):
        start = time.process_time()
        _call(pipeline, rows)
        yield time.process_time() - start


def adapters(pipeline: TangoPipeline, rounds: int, prompts: int) -> dict[str, Any]:
    """Return the cost of a step with adapters of rank 8 on the attention, relative to one without."""
    figures: dict[str, Any] = {}
    own = [_random_adapter(pipeline.unet, seed) for seed in range(8)]
    merged = deepcopy(pipeline.unet)
    for layer, one in own[0].layers.items():
        merged.get_submodule(layer).weight.data += (one.down_IK @ one.up_KO).T
    for rows in ROWS:
        clips = rows // 2
        chosen: dict[str, list[Adapter | None]] = {
            "the same one": [own[0]] * rows,
            "different ones": [own[clip] for clip in range(clips) for _ in range(2)],
            "one clip with, others without": [own[0], own[0], *[None] * (rows - 2)],
        }
        for name, of_rows in chosen.items():
            applied = RowAdapters(pipeline.unet, of_rows)
            ratios = []
            for _ in range(rounds):
                (plain,) = list(_call_times(pipeline, rows, 0))
                with applied.applied():
                    (other,) = list(_call_times(pipeline, rows, 0))
                ratios.append(other / plain)
            figures[f"{rows} rows: {name}"] = median(ratios)
    start = time.process_time()
    RowAdapters(pipeline.unet, [own[row // 2] for row in range(16)])
    figures["milliseconds to lay out 8 adapters in 16 rows"] = 1e3 * (time.process_time() - start)
    figures["kibibytes of an adapter"] = own[0].size / 2**10
    figures["snr_db against the merged model"] = _snr_of_adapter(pipeline, own[0], merged)
    return figures


def _random_adapter(denoiser: nn.Module, seed: int, rank: int = 8) -> Adapter:
    """Return an adapter that changes each layer of the attention by a tenth of its size."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            down_IK = torch.randn(layer.in_features, rank, generator=generator)
            up_KO = torch.randn(rank, layer.out_features, generator=generator)
            size = layer.weight.norm() / (down_IK @ up_KO).norm()
            layers[name] = LowRank(down_IK=down_IK, up_KO=0.1 * size * up_KO)
    return Adapter(version=UNVERSIONED, layers=layers)


def _snr_of_adapter(pipeline: TangoPipeline, adapter: Adapter, merged: nn.Module) -> float | None:
    """Return how near a render with the adapter is to that of the merged denoiser."""
    with RowAdapters(pipeline.unet, [adapter, adapter]).applied():
        by_row = _render(pipeline, [PROMPT])
    own, pipeline.unet = pipeline.unet, merged
    try:
        return _snr(_render(pipeline, [PROMPT]), by_row)
    finally:
        pipeline.unet = own


def decodes(pipeline: TangoPipeline, rounds: int, prompts: int) -> dict[str, Any]:
    """Return how often the steps of one request are held up by the decodes of others, and for how long."""
    events: list[tuple[float, str, Event]] = []

    def note(name: str, event: Event) -> None:
        events.append((time.monotonic(), name, event))

    with Engine(pipeline, EngineConfig(threads=1)) as engine:
        request = engine.request(PROMPT, seed=0, num_inference_steps=100)
        handles = [engine.submit(request, partial(note, "long"))]
        for number in range(20):
            short = engine.request(PROMPT, seed=number, num_inference_steps=4)
            handles.append(engine.submit(short, partial(note, "short")))
        for handle in handles:
            handle.wait(600)
    assert not [event for _, _, event in events if isinstance(event, Failed)]
    gaps: list[tuple[float, int]] = []
    last, between = None, 0
    for at, name, event in events:
        if name == "short" and isinstance(event, Clip):
            between += 1
        elif name == "long" and isinstance(event, Progress):
            if last is not None:
                gaps.append((at - last, between))
            last, between = at, 0
        elif isinstance(event, Finished) and name == "long":
            break
    quiet = [seconds for seconds, clips in gaps if not clips]
    held = [seconds for seconds, clips in gaps if clips]
    return {
        "steps": len(gaps),
        "most decodes of others between two steps": max(clips for _, clips in gaps),
        "median milliseconds between steps without a decode": 1e3 * median(quiet),
        "median milliseconds between steps with decodes": 1e3 * median(held) if held else None,
    }


MEASURES: Final[Mapping[str, Callable[[TangoPipeline, int, int], dict[str, Any]]]] = {
    "schedulers": schedulers,
    "adapters": adapters,
    "decodes": decodes,
    "variants": variants,
}


def main() -> None:
    """Measure, print and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of which the median counts")
    parser.add_argument("--prompts", type=int, default=100, help="prompts that the tagger judges")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--output", type=Path, default=Path("build/bench/ablations.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = cast(TangoPipeline, load_generator(mini_folder("mini")))
    report: dict[str, Any] = {"machine": machine(), **versions("torch", "diffusers")}
    for name in arguments.only:
        report[name] = MEASURES[name](pipeline, arguments.rounds, arguments.prompts)
        print(name, {key: value for key, value in report[name].items() if name != "variants"}, flush=True)
        write_report(arguments.output, report)


if __name__ == "__main__":
    main()
