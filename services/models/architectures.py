"""The registry of generator families, and functions to check and load a generator of any family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from services.errors import ModelFormatError
from services.models.audiogen.pipeline import AUDIOGEN
from services.models.latent import LatentPipeline
from services.models.pipelines import Architecture, read_index
from services.models.tango.loading import TANGO
from services.models.tangoflux.pipeline import TANGOFLUX

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "TangoPipeline": TANGO,
    "TangoFluxPipeline": TANGOFLUX,
    "AudioGenPipeline": AUDIOGEN,
}
"""Families by `_class_name` in a folder's `model_index.json`."""


def architecture_of(folder: Path) -> Architecture:
    """Return the family of the model in `folder`. Raises `ModelNotFoundError` or `ModelFormatError`."""
    name = str(read_index(folder).get("_class_name"))
    if name not in ARCHITECTURES:
        raise ModelFormatError(
            f"{folder} holds a {name}, which is not supported; give one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def check_generator(folder: Path) -> None:
    """Raise `ModelNotFoundError` or `ModelFormatError` unless `folder` is a generator's. Loads no weights."""
    architecture_of(folder).check(folder)


def load_generator(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    decoder_dtype: str = "float32",
    offload: bool = False,
) -> LatentPipeline:
    """Load the generator in `folder` for inference.

    Args:
        folder: model folder of one of the `ARCHITECTURES`, written by `milonga convert` or `save_pretrained`.
        device: torch's name of a device, or ``auto``: cuda if available, otherwise cpu.
        dtype: float type of text encoder and denoiser, whatever the files have.
        decoder_dtype: float type of the decoders: half precision saves little there, and is more audible.
        offload: whether the family's `offloadable` parts stay in main memory, and each of their layers is
            copied to the device when it runs.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFormatError: the folder has another architecture, missing or damaged weights, or pickles.
        InvalidInputError: the device or float type does not exist.
    """
    return architecture_of(folder).load(
        folder, device=device, dtype=dtype, decoder_dtype=decoder_dtype, offload=offload
    )
