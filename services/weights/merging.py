"""Merge an adapter into the model that it was trained from, where the adapter's URI is used as a model's."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from services.errors import ModelError, ModelFormatError
from services.models.architectures import architecture_of
from services.models.folders import read_json
from services.models.lora import LowRank, read_low_ranks
from services.models.manifest import ADAPTER_CONFIG, MANIFEST_NAME, verify_manifest, write_manifest
from services.models.writing import replaced_folder
from services.weights.registry import cache_folder
from services.weights.uri import ModelURI, ResolvedModel, resolve


def merged(adapter: ResolvedModel, tracking_uri: str | None = None) -> ResolvedModel:
    """Return the model of a resolved adapter: its base's parts, and the denoiser with the adapter merged.

    It has the adapter's identity. Its folder is in the cache under the adapter's digest; unchanged files are
    links to the base's, where the file system allows it.

    Raises:
        ModelFormatError: the adapter does not state its base, or does not fit it.
        ModelError: its base can't be had.
        OutputError: the cache can't be written.
    """
    folder, identity = adapter.folder, adapter.identity
    base = _base_of(folder, tracking_uri)
    target = cache_folder() / "merged" / adapter.digest.removeprefix("sha256:")
    with suppress(ModelError):
        verify_manifest(target)
        return replace(adapter, folder=target, adapter=folder)
    architecture = architecture_of(base.folder)
    architecture.check(base.folder)
    part = architecture.denoiser
    products = read_low_ranks(folder, architecture.meta_denoiser(base.folder))
    with replaced_folder(target) as temporary:
        for path in _files(base.folder):
            copy = temporary / path.relative_to(base.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.parent == base.folder / part and path.suffix == ".safetensors":
                _merge(path, copy, products)
            else:
                _link(path, copy)
        write_manifest(temporary, identity.name, identity.version, identity.license)
    return replace(adapter, folder=target, adapter=folder)


def _base_of(folder: Path, tracking_uri: str | None) -> ResolvedModel:
    path = folder / ADAPTER_CONFIG
    uri = read_json(path).get("base_model_name_or_path")
    if not isinstance(uri, str) or not uri:
        raise ModelFormatError(
            f"{path} does not state the model that it was trained from; write its URI to "
            "base_model_name_or_path, or name the adapter in requests to a service of that model"
        )
    try:
        return resolve(ModelURI.parse(uri), tracking_uri=tracking_uri)
    except ModelError as error:
        raise type(error)(f"{path}: the model that the adapter was trained from: {error}") from error


def _files(folder: Path) -> Iterator[Path]:
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


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or another user's file
        shutil.copyfile(source, target)
