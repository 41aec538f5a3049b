"""Compare weights with the module that loads them: every key, shape and kind of number must match."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from services.errors import ModelFormatError

Module = TypeVar("Module", bound=nn.Module)

TIED: Mapping[str, str] = {"encoder.embed_tokens.weight": "shared.weight"}
"""T5's token embedding has two names; a file may have either or both."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights. Others would load without an error: integers by rounding, complex numbers by halves."""

_LISTED = 20
"""Number of keys that an error message names; the others are counted."""


def on_meta(build: Callable[[], Module]) -> Module:
    """Return the module of `build` on the meta device: shapes without memory."""
    with torch.device("meta"):
        return build()


def check_weights(part: str, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise `ModelFormatError` that lists every key of the weights that does not fit, as `check_layout`.

    Args:
        part: name of the weights in the message.
        module: module that will load them; may be on the meta device.
        weights: the tensors, by key; may be on the meta device.
    """
    expected, found = module.state_dict(), dict(weights)
    for alias, original in TIED.items():
        if alias in expected and original in expected and (alias in found) != (original in found):
            found[alias] = found[original] = found.get(alias, found.get(original, expected[alias]))
    check_layout(part, expected, found)


def check_layout(part: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `ModelFormatError` that lists every missing, unknown and misshapen key of the weights `found`,
    and those whose numbers are of another kind: integers, complex or 8-bit numbers in the place of floats.
    """
    both = {key: (tensor, found[key]) for key, tensor in expected.items() if key in found}
    misshapen = [
        f"{key} is {list(given.shape)}, not {list(own.shape)}"
        for key, (own, given) in both.items()
        if given.shape != own.shape
    ]
    other_numbers = [
        f"{key} has {_name(given.dtype)}, not {'floats' if own.dtype in FLOATS else _name(own.dtype)}"
        for key, (own, given) in both.items()
        if (given.dtype not in FLOATS if own.dtype in FLOATS else given.dtype in FLOATS)
    ]
    faults = (
        ("missing keys", [key for key in expected if key not in found]),
        ("unknown keys", [key for key in found if key not in expected]),
        ("wrong shapes", misshapen),
        ("wrong types", other_numbers),
    )
    report_faults(part, faults)


def report_faults(part: str, faults: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise `ModelFormatError`, one line, for the `faults` (title, entries) that have entries."""
    found = [f"{len(entries)} {title}: {_listed(entries)}" for title, entries in faults if entries]
    if found:
        raise ModelFormatError(f"{part}: these weights are not this model's: {'; '.join(found)}")


def check_finite(part: str, weights: Mapping[str, Tensor]) -> None:
    """Raise `ModelFormatError` that lists the tensors with NaN or infinite values."""
    wrong = [key for key, tensor in weights.items() if not _is_finite(tensor)]
    if wrong:
        dtype = _name(weights[wrong[0]].dtype)
        raise ModelFormatError(
            f"{part}: {len(wrong)} of {len(weights)} tensors hold NaN or infinity ({dtype}): {_listed(wrong)}"
            "; the training diverged or the file is damaged: take another checkpoint"
        )


def assign_weights(part: str, module: Module, weights: Mapping[str, Tensor]) -> Module:
    """Assign `weights` to `module`, which is on the meta device, after `check_weights` and `check_finite`.

    Returns `module`.
    """
    check_weights(part, module, weights)
    check_finite(part, weights)
    full = dict(weights)
    own = module.state_dict()
    tied = {alias: original for alias, original in TIED.items() if alias in own and original in own}
    for alias, original in tied.items():
        given = [full[key] for key in (alias, original) if key in full]
        if len(given) == 2 and not given[0].is_meta and not torch.equal(*given):
            raise ModelFormatError(f"{part}: {alias} and {original} differ, but are one tensor in this model")
        full[alias] = full[original] = given[0]
    module.load_state_dict(full, strict=True, assign=True)
    for alias, original in tied.items():
        owner, _, name = alias.rpartition(".")
        setattr(module.get_submodule(owner), name, module.get_parameter(original))
    return module


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence progress bars, logs and deprecation warnings of diffusers and transformers in the context."""
    bars = [
        library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()
    ]
    levels = [
        (logging.getLogger(name), logging.getLogger(name).level) for name in ("diffusers", "transformers")
    ]
    for library in bars:
        library.disable_progress_bar()
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # diffusers' autoencoder of waveforms uses torch's deprecated weight_norm.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in bars:
            library.enable_progress_bar()
        for logger, level in levels:
            logger.setLevel(level)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether `tensor` holds no NaN and no infinity, in one pass and without a copy."""
    if tensor.is_meta or tensor.dtype not in FLOATS or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more
