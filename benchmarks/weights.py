"""Memory of a Tango 2's weights by part and number format, counted from the tensors of its modules.

    python -m benchmarks.weights [--output benchmarks/weights.json]

The model has the released sizes and is built on the meta device: nothing is allocated. Formats: float32; as
served with `--dtype bfloat16` (autoencoder and vocoder stay in float32); the same with int8 weights in the
linear layers of text encoder and denoiser, with a float32 scale for each output. On the device with
`--offload`: the denoiser, and the largest layer of the other parts.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from benchmarks.gpu import build
from benchmarks.measuring import versions, write_report

PARTS: Final = ("text_encoder", "unet", "vae", "vocoder")
DECODERS: Final = ("vae", "vocoder")
GIB: Final = 2**30


def bytes_of(part: nn.Module, width: int, *, int8: bool = False) -> Mapping[str, int]:
    """Return the bytes of each module's own parameters, those that are tied counted once.

    Args:
        part: the module.
        width: bytes of a number.
        int8: whether the weights of linear layers take a byte, with four for each output.
    """
    found: Counter[str] = Counter()
    for name, parameter in part.named_parameters():
        owner, _, own = name.rpartition(".")
        layer = part.get_submodule(owner)
        quantised = int8 and isinstance(layer, nn.Linear) and own == "weight"
        found[owner] += parameter.numel() + 4 * len(parameter) if quantised else width * parameter.numel()
    return found


def table(pipeline: Any) -> dict[str, dict[str, float]]:
    """Return parameters in millions and GiB by format of each part, and the sums."""
    rows: dict[str, dict[str, float]] = {}
    for name in PARTS:
        part = cast(nn.Module, getattr(pipeline, name))
        half = 4 if name in DECODERS else 2
        served = bytes_of(part, half)
        int8 = served if name in DECODERS else bytes_of(part, half, int8=True)
        offloaded = sum(served.values()) if name == "unet" else 0
        rows[name] = {
            "millions of parameters": sum(one.numel() for one in part.parameters()) / 1e6,
            "float32": sum(bytes_of(part, 4).values()) / GIB,
            "as served in bfloat16": sum(served.values()) / GIB,
            "with int8 linear layers": sum(int8.values()) / GIB,
            "on the device with offload": offloaded / GIB,
            "its largest layer": max(served.values()) / GIB,
        }
    sums = {column: sum(row[column] for row in rows.values()) for column in rows["unet"]}
    sums["its largest layer"] = max(row["its largest layer"] for name, row in rows.items() if name != "unet")
    sums["on the device with offload"] += sums["its largest layer"]
    return {**rows, "all": sums}


def main(argv: list[str] | None = None) -> None:
    """Count, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/weights.json"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a test of this program")
    arguments = parser.parse_args(argv)
    rows = {
        name: {column: round(value, 3) for column, value in row.items()}
        for name, row in table(build(torch.device("meta"), torch.float32, tiny=arguments.tiny)).items()
    }
    for name, row in rows.items():
        print(name, row)
    write_report(arguments.output, {"versions": versions("torch", "diffusers", "transformers"), "GiB": rows})


if __name__ == "__main__":
    main()
