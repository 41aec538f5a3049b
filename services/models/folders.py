"""Read the files of a model folder; choose devices and dtypes.

Folders are untrusted: nothing in them is executed, and every error names the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from services.errors import ModelFormatError, invalid

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Float types by the names that options and settings use."""

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Extensions of files that can run code when they are loaded."""


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the safetensors files of `folder`.

    Raises `ModelFormatError` if there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLE_SUFFIXES]
        found = f"only a pickle payload ({', '.join(pickles)})" if pickles else "no weights"
        raise ModelFormatError(f"{folder} holds {found}; weights must be safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= safetensors_shapes(path)
    return shapes


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file. Raises `ModelFormatError` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(
            f"{path} is truncated or not safetensors ({one_line(error)}); fetch it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `ModelFormatError` if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFormatError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path} can't be read: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ModelFormatError(f"{path} is not a JSON object")
    return data


def pick_dtype(field: str, name: str) -> torch.dtype:
    """Return the float type called `name`. Raises `InvalidInputError` for `field` if there is none."""
    if name not in DTYPES:
        raise invalid(field, f"unknown type {name!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_device(name: str) -> torch.device:
    """Return the device `name` (``auto``: cuda if available, otherwise cpu), after a test allocation.

    Raises `InvalidInputError` if it can't be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise invalid("device", f"{name!r} can't be used: {one_line(error)}") from error
    return device


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
