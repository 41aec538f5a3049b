"""Resolve model URIs, once, to immutable folders or files with a known digest.

==========================  =====================================================================
``mini``, ``mini-base``     the embedded generators
``mini:NAME``               any model of the embedded family
``file:PATH``               a model folder
``hf:OWNER/NAME[@REV]``     a snapshot from the Hugging Face hub; only safetensors are fetched
``laion:PATH``              a LAION CLAP checkpoint (``.pt``)
``laion-clap:PATH``         the same file, read by the laion_clap package
``models:/NAME/VERSION``    a version in MLflow's registry (`services.weights.registry`)
``models:/NAME@ALIAS``      the version that an alias points to when it is resolved
==========================  =====================================================================

Any of them may end in a pin, ``#sha256:HEX``: then weights with another digest are refused.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from services.api.model import ModelVersion
from services.environment import HUB_SCHEMES
from services.errors import (
    DigestMismatchError,
    FieldViolation,
    InvalidInputError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    invalid,
)
from services.models.manifest import ADAPTER_CONFIG, DIGEST, READY_MADE, hash_file, verify_manifest
from services.models.mini import GENERATORS, PARTS, mini_folder
from services.weights.registry import fetch, fetch_digest, parse_path

EMBEDDED = GENERATORS
"""Models of the embedded family that need no prefix."""

LAION_SCHEMES = ("laion", "laion-clap")
"""Schemes that name one file."""

_FORMS = (
    f"{', '.join(EMBEDDED)}, mini:NAME, file:PATH, hf:OWNER/NAME, laion:PATH, laion-clap:PATH, "
    "models:/NAME/VERSION or models:/NAME@ALIAS"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_BYTES, _MAX_NAME = 4095, 255
"""Limits of file systems for a path and for each name in it."""
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# No pickles: a file that is not fetched can't be loaded by mistake.
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelURI:
    """A parsed model URI."""

    scheme: str
    """embedded, file, hf, laion, laion-clap or models."""
    path: str
    """The part after the scheme; the name of an embedded model. Empty: the version in the registry with this
    digest, whatever it is called."""
    digest: str | None = None
    """The pin: `sha256:` and 64 hexadecimal digits."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `text`.

        Raises:
            InvalidInputError: it is no model URI, or its pin is no digest.
        """
        if not text.isprintable():
            raise _invalid(f"is {text[:80]!r}, which has characters that no model URI has")
        if len(text.encode()) > _MAX_BYTES or max(len(part.encode()) for part in text.split("/")) > _MAX_NAME:
            raise _invalid(f"is {text[:80]!r}…, which is longer than a path or a name in it may be")
        if _CONTROL.search(text):
            raise _invalid(f"is {text[:80]!r}, which has control characters; leave them out")
        location, hash_sign, pin = text.partition("#")
        if hash_sign and not DIGEST.fullmatch(pin):
            raise _invalid(f"has the pin {pin[:80]!r}, must be sha256: and 64 lowercase hexadecimal digits")
        if location in EMBEDDED:
            return cls(scheme="embedded", path=location, digest=pin or None)
        scheme, _, path = location.partition(":")
        if scheme not in ("mini", "file", "hf", *LAION_SCHEMES, "models") or not path:
            raise _invalid(f"is {text[:80]!r}, must be {_FORMS}")
        if scheme == "mini":
            return cls(scheme="embedded", path=_member(path), digest=pin or None)
        if scheme == "hf" and not _HUB_NAME.fullmatch(path):
            raise _invalid(f"is {text[:80]!r}, must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
        if scheme == "models":
            parse_path(path)
        return cls(scheme=scheme, path=path, digest=pin or None)

    @property
    def needs_network(self) -> bool:
        """Return whether resolving or loading may download from the Hugging Face hub."""
        return self.scheme in HUB_SCHEMES


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """Weights that were found and verified: every file has the digest that its manifest states."""

    folder: Path
    """The model folder; of LAION's checkpoints the file."""
    identity: ModelVersion
    """Version of the weights."""
    own: Path | None = None
    """Folder that `identity` is of, where `folder` was made from it: of an adapter, which is merged into its
    model there, or of own weights, which are completed by ready-made parts."""
    reader: Literal["folder", "laion", "laion-clap"] = "folder"
    """Loader of the weights: of model folders, or one of the two for LAION's checkpoints."""

    @property
    def own_folder(self) -> Path:
        """Folder whose digest is `digest`: of an adapter its own, not that of the merged model."""
        return self.own or self.folder

    @property
    def digest(self) -> str:
        """`sha256:` and the digest over every file."""
        return self.identity.digest


def served_uri(model: str, unpinned_model: str = "") -> ModelURI:
    """Return what a generation service serves: `model`, or, if that is empty, `unpinned_model` without a pin.

    Raises:
        InvalidInputError: both are empty, or the used one is no model URI.
    """
    if model:
        return ModelURI.parse(model)
    if unpinned_model:
        try:
            return ModelURI.parse(unpinned_model)
        except InvalidInputError as error:
            faults = (FieldViolation("unpinned_model", fault.description) for fault in error.violations)
            raise InvalidInputError(*faults) from error
    raise _invalid(
        "is empty: there is no pin; `milonga promote bootstrap` sets one, or give a model URI: --model, or "
        "set MILONGA_MODEL"
    )


def parse_uris(texts: Mapping[str, str], field: str = "{}") -> dict[str, ModelURI]:
    """Parse several model URIs by name.

    Raises:
        InvalidInputError: lists every wrong one; `field` gives the path of a name in the error.
    """
    uris: dict[str, ModelURI] = {}
    faults: list[FieldViolation] = []
    for name, text in texts.items():
        try:
            uris[name] = ModelURI.parse(text)
        except InvalidInputError as error:
            faults += [FieldViolation(field.format(name), fault.description) for fault in error.violations]
    if faults:
        raise InvalidInputError(*faults)
    return uris


def resolve(uri: ModelURI | str, *, tracking_uri: str | None = None, merge: bool = True) -> ResolvedModel:
    """Find the weights that a URI names, and verify them.

    `tracking_uri` is the registry of ``models:`` URIs; None: `services.weights.registry.tracking_uri`. An
    adapter is merged into the model that it was trained from, unless `merge` is false.

    Raises:
        InvalidInputError: no model URI.
        ModelNotFoundError: there is no such model.
        ModelFormatError: it is no model folder.
        DigestMismatchError: a file differs from the manifest, or the whole from the pin.
        ServiceUnavailableError: the registry does not answer.
        ModelError: a registry's client is not installed.
    """
    uri = ModelURI.parse(uri) if isinstance(uri, str) else uri
    if uri.scheme in LAION_SCHEMES:
        found = _checkpoint(Path(uri.path).expanduser().resolve(), uri.digest)
        return replace(found, reader="laion" if uri.scheme == "laion" else "laion-clap")
    found = _resolved(uri, tracking_uri)
    return _merged(found, uri, tracking_uri, ()) if merge else found


def _merged(
    found: ResolvedModel, uri: ModelURI, tracking_uri: str | None, above: tuple[Path, ...]
) -> ResolvedModel:
    """Return a model, or what an adapter is merged into; `above` are the adapters that it is the base of."""
    if not (found.folder / ADAPTER_CONFIG).is_file():
        return found
    from services.weights.merging import merged_folder  # needs torch

    with naming(f"{found.identity.name}, the model that the adapter was trained from"):
        start = base_uri(found.folder, uri.scheme)
        if start.scheme == "file" and not any(
            (_folder(start) / name).is_file() for name in ("model_index.json", ADAPTER_CONFIG)
        ):
            raise ModelNotFoundError(f"{start.path} is no model folder; correct base_model_name_or_path")
        base = _resolved(start, tracking_uri)
        if base.folder in (found.folder, *above):
            raise ModelFormatError("is an adapter of itself; correct base_model_name_or_path")
        base = _merged(base, start, tracking_uri, (found.folder, *above))
    folder = merged_folder(found.folder, base.folder, base.digest, found.identity)
    return replace(found, folder=folder, own=found.folder)


def base_uri(adapter: Path, scheme: str) -> ModelURI:
    """Return the URI of the model that the adapter in a folder was trained from.

    An adapter is untrusted: it must not have other places read than its own kind of place, `scheme`. For one
    of the registry, a model that it states elsewhere is the registered version with the same digest.

    Raises `ModelFormatError` if it states none, or one that it may not.
    """
    from services.weights.merging import base_of  # needs torch

    try:
        start = ModelURI.parse(base_of(adapter))
    except InvalidInputError as error:
        (fault,) = error.violations
        raise ModelFormatError(f"base_model_name_or_path {fault.description}") from error
    if start.scheme in ("embedded", "models") or (start.scheme == scheme and scheme not in LAION_SCHEMES):
        return start
    if scheme == "models" and start.digest and start.scheme not in LAION_SCHEMES:
        return ModelURI(scheme="models", path="", digest=start.digest)
    raise ModelFormatError(
        f"{start.scheme}:{start.path} can't be the base of an adapter in {scheme}:; register "
        "that model, and state it as models:/NAME/VERSION in base_model_name_or_path"
    )


def _resolved(uri: ModelURI, tracking_uri: str | None) -> ResolvedModel:
    """Return what a URI names; own weights are completed."""
    found = _found(uri, tracking_uri)
    if not (found.folder / READY_MADE).is_file():
        return found
    from services.weights.completing import completed_folder  # needs torch

    return replace(found, folder=completed_folder(found.folder, found.identity), own=found.folder)


def _found(uri: ModelURI, tracking_uri: str | None) -> ResolvedModel:
    if uri.scheme == "models":
        if uri.path:
            folder, identity = fetch(uri.path, pin=uri.digest, uri=tracking_uri)
        else:
            folder, identity = fetch_digest(uri.digest or "", uri=tracking_uri)
        return ResolvedModel(folder=folder, identity=identity)
    folder = _folder(uri)
    if not folder.is_dir():
        raise ModelNotFoundError(f"model: {folder} is no folder; give the one that holds the model's files")
    manifest = verify_manifest(folder, uri.digest)
    return ResolvedModel(
        folder=folder,
        identity=ModelVersion(
            name=manifest.name,
            version=manifest.version,
            digest=manifest.digest,
            license=manifest.license,
        ),
    )


def _checkpoint(path: Path, pin: str | None) -> ResolvedModel:
    """Resolve a single file, which has no manifest: its digest is that of its bytes."""
    try:
        digest = f"sha256:{hash_file(path)}"
    except OSError as error:
        raise ModelNotFoundError(
            f"model: {path} can't be read: {error.strerror}; give the path of a LAION checkpoint (.pt)"
        ) from error
    if pin not in (None, digest):
        raise DigestMismatchError(f"{path} is {digest}, not {pin}; correct the pin or the model URI")
    identity = ModelVersion(name=path.stem, version="unversioned", digest=digest, license="unknown")
    return ResolvedModel(folder=path, identity=identity)


def _folder(uri: ModelURI) -> Path:
    match uri.scheme:
        case "embedded":
            return mini_folder(uri.path)
        case "file":
            return Path(uri.path).expanduser().resolve()
        case "hf":
            return _snapshot(uri.path)
        case _:
            raise AssertionError(f"a folder of the scheme {uri.scheme}")


def _snapshot(path: str) -> Path:
    """Return the folder of a hub snapshot: from the cache if it is there, from the hub otherwise."""
    from huggingface_hub import snapshot_download

    found = _HUB_NAME.fullmatch(path)
    assert found is not None
    name, revision = found["name"], found["revision"]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_HUB_PATTERNS), local_files_only=True
            )
        )
    except OSError:
        # Not in the cache: LocalEntryNotFoundError is an OSError.
        pass
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_PATTERNS)))
    except Exception as error:
        # The hub's client raises errors of four libraries; to the user they mean one thing: no download.
        reason = str(error).partition("\n")[0]
        raise ModelNotFoundError(
            f"model: hf:{path} is not in the cache and could not be fetched: {reason}"
        ) from error


def _member(name: str) -> str:
    if name not in PARTS:
        raise _invalid(f"is 'mini:{name[:80]}', must be mini: and one of {', '.join(PARTS)}")
    return name


def _invalid(description: str) -> InvalidInputError:
    return invalid("model", description)


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Prefix errors with the name of the model that they are about."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"{part}: {error}") from error
