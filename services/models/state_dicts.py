"""Weights against the module they belong to: every key and every shape accounted for, before any is used."""

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
"""T5's token embedding stands under two names; a file may hold either or both."""

_LISTED = 20
"""Keys that an error message names before it counts the rest."""


def on_meta(build: Callable[[], Module]) -> Module:
    """The module that `build` makes, with shapes and no memory."""
    with torch.device("meta"):
        return build()


def check_weights(part: str, module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise `ModelFormatError` that lists every missing, unknown and misshapen key of `module`'s weights.

    `part` names them in the message; `shapes` is what the file holds. `module` may be on the meta device.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    held = {key: tuple(shape) for key, shape in shapes.items()}
    for alias, original in TIED.items():
        if alias in wanted and original in wanted and (alias in held) != (original in held):
            held[alias] = held[original] = held.get(alias, held.get(original, ()))
    misshapen = [
        f"{key} is {list(held[key])}, not {list(shape)}"
        for key, shape in wanted.items()
        if key in held and held[key] != shape
    ]
    faults = (
        ("missing keys", [key for key in wanted if key not in held]),
        ("unknown keys", [key for key in held if key not in wanted]),
        ("wrong shapes", misshapen),
    )
    report_faults(part, faults)


def report_faults(part: str, faults: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise `ModelFormatError` with all `faults` (title, entries) that have entries, in one line."""
    found = [f"{len(entries)} {title}: {_listed(entries)}" for title, entries in faults if entries]
    if found:
        raise ModelFormatError(f"{part}: these weights are not this model's: {'; '.join(found)}")


def assign_weights(part: str, module: Module, weights: Mapping[str, Tensor]) -> Module:
    """Put `weights` in place of the tensors of `module` (on the meta device), after `check_weights`."""
    check_weights(part, module, {key: tensor.shape for key, tensor in weights.items()})
    full = dict(weights)
    own = module.state_dict()
    tied = {alias: original for alias, original in TIED.items() if alias in own and original in own}
    for alias, original in tied.items():
        given = [full[key] for key in (alias, original) if key in full]
        if len(given) == 2 and not given[0].is_meta and not torch.equal(*given):
            raise ModelFormatError(f"{part}: {alias} and {original} differ, and are one tensor in this model")
        full[alias] = full[original] = given[0]
    module.load_state_dict(full, strict=True, assign=True)
    for alias, original in tied.items():
        owner, _, name = alias.rpartition(".")
        setattr(module.get_submodule(owner), name, module.get_parameter(original))
    return module


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence progress bars, log messages and deprecation warnings of the model libraries inside."""
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
            # Of one library about another: the autoencoder of waveforms uses torch's older weight_norm.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in bars:
            library.enable_progress_bar()
        for logger, level in levels:
            logger.setLevel(level)


def _listed(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more
