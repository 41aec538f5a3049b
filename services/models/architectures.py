"""The registry of generator families, and the functions that load any of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from services.errors import ModelFormatError
from services.models.latent import LatentPipeline
from services.models.pipelines import Architecture, read_index
from services.models.tango.loading import TANGO
from services.models.tangoflux.pipeline import TANGOFLUX

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "TangoPipeline": TANGO,
    "TangoFluxPipeline": TANGOFLUX,
}
"""By the `_class_name` of a folder's `model_index.json`."""


def architecture_of(folder: Path) -> Architecture:
    """Return the family of the model in `folder`. Raises `ModelNotFoundError` or `ModelFormatError`."""
    name = str(read_index(folder).get("_class_name"))
    if name not in ARCHITECTURES:
        raise ModelFormatError(
            f"{folder} holds a {name}, which is not supported; give one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def check_generator(folder: Path) -> None:
    """Raise `ModelNotFoundError` or `ModelFormatError` unless `folder` holds a generator, unloaded."""
    architecture_of(folder).check(folder)


def load_generator(
    folder: Path, *, device: str = "cpu", dtype: str = "float32", decoder_dtype: str = "float32"
) -> LatentPipeline:
    """Load the generator in `folder` for inference.

    Args:
        folder: of one of the `ARCHITECTURES`, as `milonga convert` or `save_pretrained` wrote it.
        device: torch's name of one, or ``auto``: cuda where there is one, otherwise cpu.
        dtype: number format of text encoder and denoiser, whatever was stored.
        decoder_dtype: of the parts that make sound: half precision saves little there and is audible sooner.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFormatError: it holds something else (another architecture, missing or damaged weights, pickles).
        InvalidInputError: the device or number format does not exist.
    """
    return architecture_of(folder).load(folder, device=device, dtype=dtype, decoder_dtype=decoder_dtype)
