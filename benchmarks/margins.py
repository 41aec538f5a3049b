"""Rounding noise in DPO's margin, by the number format of the denoiser's forward pass.

    python -m benchmarks.margins [--pairs 8] [--width 64] [--output benchmarks/margins.json]

The margin of a pair at beta 2000 is 1,000 times the difference of four mean squared errors, each a mean over
8 × 256 × 16 latents. Early in a training, and at Tango 2's learning rate for long, policy and reference are
almost equal, so the margin is small, and their predictions round differently. Here the policy is the
reference with a step of `UPDATE` in a random direction of every weight; the noise is the standard deviation
over pairs of the margin less that of float32. The denoiser has the released one's layout and depth at a width
of choice, and random weights; its output has unit variance as v has, and its errors are a trained model's.

"tf32" rounds the inputs of products to 10 bits, as an NVIDIA GPU does; here that is emulated. "bf16, only the
output" rounds nothing but the prediction.

Shape legend: B clips, C channels, T frames, F bins, L tokens, D width.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from benchmarks.measuring import machine, versions, write_report
from services.models.tango.checkpoint import UNET_CONFIG
from training.objectives.diffusion import diffusion_dpo
from training.objectives.noising import mean_products, residuals

LATENTS_CTF: Final = (8, 256, 16)
BETA: Final = 2_000.0
UPDATE: Final = 1e-5
"""Change of each weight: about ten steps at Tango 2's learning rate of 9.6e-7, all in one direction."""
ERROR: Final = 0.35
"""Mean squared error of v of a trained model."""
TEXT_LD: Final = (20, 128)
BATCH: Final = 2


class EmulatedTf32(TorchFunctionMode):
    """Rounds float32 inputs of matrix products and convolutions to TF32's 10 bits of mantissa."""

    PRODUCTS = (
        nn.functional.linear,
        nn.functional.conv2d,
        nn.functional.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.baddbmm,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = [_ten_bits(one) if isinstance(one, Tensor) else one for one in args]
        return func(*args, **(kwargs or {}))


def _ten_bits(values: Tensor) -> Tensor:
    """Round to the nearest float32 whose lower 13 bits of mantissa are zero."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def make_denoiser(width: int) -> Any:
    """Return a U-Net of the released layout, `width` channels at the top, whose output has unit variance."""
    scale = width / UNET_CONFIG["block_out_channels"][0]
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        **dict(UNET_CONFIG)
        | {
            "block_out_channels": [round(scale * channels) for channels in UNET_CONFIG["block_out_channels"]],
            "attention_head_dim": [max(1, round(scale * n)) for n in UNET_CONFIG["attention_head_dim"]],
            "cross_attention_dim": TEXT_LD[1],
        }
    ).eval()
    with torch.no_grad():
        deviation = denoiser(*_inputs(0, BATCH)).sample.std()
        denoiser.conv_out.weight /= deviation
        denoiser.conv_out.bias /= deviation
    return denoiser.requires_grad_(False)


def _inputs(seed: int, clips: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy_BCTF = torch.randn(clips, *LATENTS_CTF, generator=generator)
    timesteps_B = torch.randint(0, 1_000, (clips,), generator=generator)
    return noisy_BCTF, timesteps_B, torch.randn(clips, *TEXT_LD, generator=generator)


def step_away(denoiser: Any) -> Any:
    """Return a copy with each weight moved by `UPDATE`, up or down at random."""
    policy = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter += UPDATE * torch.randn(parameter.shape, generator=generator).sign()
    return policy


def _rounded_output(denoiser: Any, inputs: Any) -> Tensor:
    output_BCTF: Tensor = denoiser(*inputs).sample
    return output_BCTF.bfloat16()


def _within(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[Any, Any], Tensor]:
    def forward(denoiser: Any, inputs: Any) -> Tensor:
        with context():
            output_BCTF: Tensor = denoiser(*inputs).sample
        return output_BCTF

    return forward


FORMATS: Final[Mapping[str, Callable[[Any, Any], Tensor]]] = {
    "float32": _within(contextlib.nullcontext),
    "tf32": _within(EmulatedTf32),
    "bf16, only the output": _rounded_output,
    "bf16": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
}


def margins(denoiser: Any, policy: Any, pairs: int) -> dict[str, Tensor]:
    """Return the margins of pairs, by number format."""
    found: dict[str, list[Tensor]] = {name: [] for name in FORMATS}
    for seed in tqdm(range(pairs), unit="pair"):
        inputs = _inputs(1 + seed, BATCH)
        exact_BCTF = denoiser(*inputs).sample
        noise = torch.Generator().manual_seed(seed)
        target_BCTF = exact_BCTF + ERROR**0.5 * torch.randn(exact_BCTF.shape, generator=noise)
        for name, forward in FORMATS.items():
            left_BCTF = [residuals(forward(model, inputs), target_BCTF) for model in (policy, denoiser)]
            ours_B, reference_B = (mean_products(one, one) for one in left_BCTF)
            found[name].append(diffusion_dpo(*ours_B.chunk(2), *reference_B.chunk(2), beta=BETA).margins_B)
    return {name: torch.cat(one).double() for name, one in found.items()}


@torch.no_grad()
def measure(pairs: int, width: int) -> dict[str, Any]:
    """Return the report."""
    denoiser = make_denoiser(width)
    policy = step_away(denoiser)
    found = margins(denoiser, policy, pairs)
    exact = found["float32"]
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        **versions("torch", "diffusers"),
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "latents": list(LATENTS_CTF),
        "beta": BETA,
        "update": UPDATE,
        "pairs": pairs,
        "margin_deviation": round(float(exact.std()), 5),
        "noise": {name: round(float((one - exact).std()), 5) for name, one in found.items()},
    }


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="channels at the top; 320 as released")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/margins.json"))
    options = parser.parse_args()
    report = measure(options.pairs, options.width)
    for name, noise in report["noise"].items():
        print(f"{name:24} {noise:.5f}")
    print(f"the margin itself varies by {report['margin_deviation']:.5f}")
    write_report(options.output, report)


if __name__ == "__main__":
    main()
