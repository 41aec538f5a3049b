"""Merge an adapter into the model that it was trained from, where the adapter's URI is used as a model's."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file, save_file

from services.api.model import ModelVersion
from services.errors import ModelError, ModelFormatError
from services.models.architectures import architecture_of
from services.models.folders import read_json
from services.models.lora import LowRank, read_low_ranks
from services.models.manifest import ADAPTER_CONFIG, MANIFEST_NAME, verify_manifest, write_manifest
from services.models.writing import replaced_folder
from services.weights.registry import cache_folder


def base_of(folder: Path) -> str:
    """Return the URI of the model that the adapter was trained from. Raises `ModelFormatError`."""
    path = folder / ADAPTER_CONFIG
    uri = read_json(path).get("base_model_name_or_path")
    if not isinstance(uri, str) or not uri:
        raise ModelFormatError(
            f"{path} does not state the model that it was trained from; write its URI to "
            "base_model_name_or_path, or name the adapter in requests to a service of that model"
        )
    return uri


def merged_folder(folder: Path, base: Path, base_digest: str, identity: ModelVersion) -> Path:
    """Return the folder of the model in `base` with the adapter in `folder` merged into its denoiser.

    It is in the cache under the digests of `identity`, the adapter's, and of the base; unchanged files are
    links to the base's, where the file system allows it.

    Raises:
        ModelFormatError: the adapter does not fit the model.
        OutputError: the cache can't be written.
    """
    digests = (one.removeprefix("sha256:")[:32] for one in (identity.digest, base_digest))
    target = cache_folder() / "merged" / "-".join(digests)
    with suppress(ModelError):
        verify_manifest(target)
        return target
    architecture = architecture_of(base)
    architecture.check(base)
    products = read_low_ranks(folder, architecture.meta_denoiser(base))
    with replaced_folder(target) as temporary:
        for path in model_files(base):
            copy = temporary / path.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.parent == base / architecture.denoiser and path.suffix == ".safetensors":
                _merge(path, copy, products)
            else:
                link_or_copy(path, copy)
        write_manifest(temporary, identity.name, identity.version, identity.license)
    return target


def model_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a model folder but its manifest, its card and hidden ones."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name != MANIFEST_NAME and path.suffix != ".md":
            yield path


def _merge(source: Path, target: Path, products: dict[str, LowRank]) -> None:
    """Write a file of weights with the products added; changed ones are float32, to keep small changes."""
    weights = load_file(source)
    for layer, one in products.items():
        key = f"{layer}.weight"
        if key in weights:
            weights[key] = weights[key].float() + (one.down_IK @ one.up_KO).T
    save_file(weights, target, metadata={"format": "pt"})


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file, or copy it where it can't be linked. Raises OSError."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or another user's file
        shutil.copyfile(source, target)
