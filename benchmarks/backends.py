"""The denoiser in ONNX Runtime and OpenVINO against torch, on one thread of a CPU.

    uv pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1
    python -m benchmarks.backends [--rounds 9] [--backends NAME …]
    python -m benchmarks.backends --only "full size" --rounds 1    # what else the report has is kept

Only this program uses those packages; without one the report says what was skipped, and why. The denoiser is
called as the engine calls it (float32 latents and timesteps, prompt and mask, a fixed number of rows), and is
exported once per number of rows by `torch.onnx.export`. Each backend takes turns with torch in float32, in
processor time of all threads. `equal bits` says whether other companions leave a row's bits as they are.

`mini` has its own weights; full size is Tango 2's released denoiser with random weights (14 GiB of memory).

Shapes: R rows, X latents [C, T, F], L tokens, D text width.
"""

import argparse
import gc
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.gpu import TEXT_TOKENS, build
from benchmarks.measuring import PROMPT, machine, memory_mib, versions, write_report
from services.models.architectures import load_generator
from services.models.latent import Conditioning
from services.models.mini import mini_folder
from services.models.tango.checkpoint import UNET_CONFIG
from services.models.tango.pipeline import TangoPipeline, velocity

FULL_SIZE_GIB: Final = 14
"""Memory that full size takes: torch's weights, and a backend's two copies while it rearranges them."""
INPUTS: Final = ("latents", "timesteps", "embeds", "mask")


class Denoiser(nn.Module):
    """A denoiser as a function of tensors alone, which is what can be exported."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents_RX: Tensor, timesteps_R: Tensor, embeds_RLD: Tensor, mask_RL: Tensor) -> Tensor:
        """Return v [R, X] in float32."""
        dtype = next(self.unet.parameters()).dtype
        text = Conditioning(tensors={"embeds": embeds_RLD.to(dtype), "mask": mask_RL})
        return velocity(self.unet, latents_RX.to(dtype), timesteps_R, text).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A denoiser to measure."""

    denoiser: Denoiser
    shape: tuple[int, int, int]
    """Of a clip's latents."""
    text: Conditioning
    """Two rows: the empty prompt, and a prompt."""
    rows: tuple[int, ...]
    """Rows of the measured calls."""
    calls: int
    """Calls in a turn: weights of small models stay in the cache from one step to the next."""

    def inputs(self, rows: int) -> tuple[Tensor, ...]:
        """Return the tensors of a call: as many clips and guided rows as fit, each at its own timestep."""
        generator = torch.Generator().manual_seed(0)
        latents_RX = torch.randn(rows, *self.shape, generator=generator)
        of_rows = [1 - row % 2 for row in range(rows)]
        embeds_RLD, mask_RL = self.text["embeds"][of_rows], self.text["mask"][of_rows]
        return latents_RX, torch.linspace(951, 51, rows), embeds_RLD, mask_RL


# ------------------------------------------------------------------------------------------------- backends

Call = Callable[[Sequence[Tensor]], Tensor]
"""Returns v [R, X] of the tensors of `Denoiser.forward`."""


def in_torch(denoiser: Denoiser, graph: Path) -> Call:
    """Return the plain call, which the others are compared with."""

    @torch.no_grad()
    def call(inputs: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, denoiser(*inputs))

    return call


def in_bfloat16(denoiser: Denoiser, graph: Path) -> Call:
    """Return the call as served with `--dtype bfloat16`."""
    return in_torch(deepcopy(denoiser).to(torch.bfloat16), graph)


def compiled(denoiser: Denoiser, graph: Path) -> Call:
    """Return the call as compiled by torch's inductor, with its weights laid out in advance."""
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = 1
    whole = torch.compile(denoiser, dynamic=False, options={"freezing": True})

    @torch.no_grad()
    def call(inputs: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, whole(*inputs))

    return call


def in_onnx_runtime(denoiser: Denoiser, graph: Path) -> Call:
    """Return the call in ONNX Runtime's CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def call(inputs: Sequence[Tensor]) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return call


def in_openvino(denoiser: Denoiser, graph: Path, *, precision: str) -> Call:
    """Return the call in OpenVINO; `precision` is of its products (where none is set, it may choose bf16)."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    model = core.compile_model(core.read_model(str(graph)), "CPU", settings)

    def call(inputs: Sequence[Tensor]) -> Tensor:
        return torch.tensor(model([tensor.numpy() for tensor in inputs])[0])

    return call


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A way to compute the denoiser."""

    build: Callable[[Denoiser, Path], Call]
    package: str | None = None
    """What it needs to be installed."""
    program: str | None = None
    """What it needs to be on the path."""

    def lack(self) -> str | None:
        """Return why the backend can't be measured here, if it can't."""
        exported = (self.package, "onnx", "onnxscript") if self.package else ()
        for package in exported:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if self.program and shutil.which(self.program) is None:
            return f"{self.program} is not installed"
        return None


BACKENDS: Final[Mapping[str, Backend]] = {
    "torch, bfloat16": Backend(build=in_bfloat16),
    "torch.compile": Backend(build=compiled, program="g++"),
    "ONNX Runtime": Backend(build=in_onnx_runtime, package="onnxruntime"),
    "OpenVINO": Backend(build=partial(in_openvino, precision="f32"), package="openvino"),
    "OpenVINO, bfloat16": Backend(build=partial(in_openvino, precision="bf16"), package="openvino"),
}


# ------------------------------------------------------------------------------------------------- measures


def export(denoiser: Denoiser, inputs: tuple[Tensor, ...], graph: Path) -> None:
    """Write the denoiser as ONNX for tensors of exactly the shapes of `inputs`."""
    with torch.no_grad():
        torch.onnx.export(
            denoiser, inputs, graph, input_names=INPUTS, output_names=["velocity"], dynamo=True, verbose=False
        )


def compare(
    subject: Subject, inputs: tuple[Tensor, ...], expected: Tensor, call: Call, rounds: int
) -> tuple[dict[str, Any], Tensor]:
    """Return the figures of a call against torch in float32, in turns, and what the call returns.

    `expected` is what torch returns.
    """
    reference = in_torch(subject.denoiser, Path())
    turns = [
        (_turn(reference, inputs, subject.calls), _turn(call, inputs, subject.calls)) for _ in range(rounds)
    ]
    ratios = [plain / own for (plain, _), (own, _) in turns]
    output = turns[-1][1][1]
    error = output - expected
    figures = {
        "torch milliseconds": round(1e3 * median(plain for (plain, _), _ in turns), 2),
        "milliseconds": round(1e3 * median(own for _, (own, _) in turns), 2),
        "times faster": round(median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "largest error": float(error.abs().max()),
        "snr_db": round(10 * torch.log10(expected.square().sum() / error.square().sum()).item(), 1),
    }
    return figures, output


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as it does in a server that has decoded some clips.

    Its threshold follows the largest block that was freed, up to 32 MiB. In a new process each of torch's
    tensors is mapped and faulted in again: a sixth of the time of 16 rows of `mini`.
    """
    torch.ones(31 * 2**20, dtype=torch.uint8)


def _turn(call: Call, inputs: Sequence[Tensor], calls: int) -> tuple[float, Tensor]:
    """Return the processor time of a call in seconds, and what it returns."""
    start = time.process_time()
    for _ in range(calls):
        output = call(inputs)
    return (time.process_time() - start) / calls, output


def _other_companions(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs with other latents and timesteps in all rows but the first."""
    latents_RX, timesteps_R, *text = (tensor.clone() for tensor in inputs)
    latents_RX[1:] = latents_RX[1:].flip(-1)
    timesteps_R[1:] += 7
    return latents_RX, timesteps_R, *text


def _processor() -> float:
    """Return the processor time so far in seconds, compilers that were started included."""
    return sum(os.times()[:4])


def measured(subject: Subject, rows: int, backends: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return the figures of each backend at a number of rows."""
    figures: dict[str, Any] = {}
    inputs = subject.inputs(rows)
    expected = in_torch(subject.denoiser, Path())(inputs)
    with TemporaryDirectory() as folder:
        graph = Path(folder) / "denoiser.onnx"
        for name in backends:
            backend = BACKENDS[name]
            if reason := backend.lack():
                figures[name] = {"skipped": reason}
                continue
            exporting, resident = _processor(), memory_mib()["VmRSS"]
            if backend.package and not graph.exists():
                export(subject.denoiser, inputs, graph)
                figures["seconds of export"] = round(_processor() - exporting, 1)
            start = _processor()
            call = backend.build(subject.denoiser, graph)
            others = call(_other_companions(inputs))
            setup = {
                "seconds of setup": round(_processor() - start, 2),
                "added MiB": round(memory_mib()["VmRSS"] - resident),
            }
            own, output = compare(subject, inputs, expected, call, rounds)
            figures[name] = {**own, "equal bits": torch.equal(others[0], output[0]), **setup}
            print(f"{rows} rows, {name}: {figures[name]}", flush=True)
            del call
            gc.collect()
    return figures


# ------------------------------------------------------------------------------------------------- subjects


def mini() -> Subject:
    """Return the denoiser of `mini`, at its default duration."""
    pipeline = cast(TangoPipeline, load_generator(mini_folder("mini")))
    return Subject(
        denoiser=Denoiser(pipeline.unet).eval(),
        shape=pipeline.latent_shape(pipeline.config.default_duration),
        text=pipeline.encode(["", PROMPT], length=pipeline.text_length(PROMPT)),
        rows=(1, 2, 16),
        calls=5,
    )


def full_size() -> Subject:
    """Return Tango 2's denoiser at its released size with random weights, for clips of 10.24 s."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(dict(UNET_CONFIG))
    return Subject(
        denoiser=Denoiser(unet.requires_grad_(False)).eval(),
        shape=(8, 256, 16),
        text=_random_text(UNET_CONFIG["cross_attention_dim"]),
        rows=(2,),
        calls=1,
    )


def tiny() -> Subject:
    """Return a tiny denoiser of the same classes."""
    pipeline = build(torch.device("cpu"), torch.float32, tiny=True)
    return Subject(
        denoiser=Denoiser(pipeline.unet).eval(),
        shape=pipeline.latent_shape(pipeline.config.default_duration),
        text=_random_text(pipeline.unet.config.cross_attention_dim),
        rows=(2,),
        calls=1,
    )


def _random_text(width: int) -> Conditioning:
    """Return an empty prompt of one token and a prompt of nine, padded."""
    mask_2L = torch.arange(TEXT_TOKENS) < torch.tensor([[1], [9]])
    return Conditioning(tensors={"embeds": torch.randn(2, TEXT_TOKENS, width), "mask": mask_2L})


SUBJECTS: Final[Mapping[str, Callable[[], Subject]]] = {"mini": mini, "full size": full_size}


def memory_lack() -> str | None:
    """Return why full size can't be measured here, if it can't."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(rows["MemAvailable"].split()[0]) / 2**20
    return f"{available:.1f} of {FULL_SIZE_GIB} GiB are available" if available < FULL_SIZE_GIB else None


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write each part as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of which the median counts")
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--rows", nargs="+", type=int, help="rows of the measured calls")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny denoiser for each: a test of this program"
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench/backends.json"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    report: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name, subject_of in SUBJECTS.items():
        if arguments.only not in (None, name):
            continue
        part = report.setdefault(name, {})
        part |= {"machine": machine(), "date": date.today().isoformat(), "versions": _versions()}
        if name == "full size" and not arguments.tiny and (reason := memory_lack()):
            part["skipped"] = reason
        else:
            subject = tiny() if arguments.tiny else subject_of()
            for rows in arguments.rows or subject.rows:
                found = measured(subject, rows, arguments.backends, arguments.rounds)
                part[f"{rows} rows"] = part.get(f"{rows} rows", {}) | found
                write_report(arguments.output, report)
        write_report(arguments.output, report)


def _versions() -> dict[str, str]:
    optional = ("onnx", "onnxscript", "onnxruntime", "openvino")
    return versions("torch", "diffusers", *(name for name in optional if importlib.util.find_spec(name)))


if __name__ == "__main__":
    main()
