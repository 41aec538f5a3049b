"""Complete a folder of a model's own weights by ready-made parts, which installed packages hold."""

from contextlib import suppress
from pathlib import Path

from services.api.model import ModelVersion
from services.errors import ModelError
from services.models.manifest import verify_manifest, write_manifest
from services.models.ready_made import read_ready_made
from services.models.state_dicts import quiet_loading
from services.models.writing import replaced_folder
from services.weights.merging import link_or_copy, model_files
from services.weights.registry import cache_folder


def completed_folder(folder: Path, identity: ModelVersion) -> Path:
    """Return the folder, in the cache, of the complete model whose own weights are in `folder`.

    Raises:
        ModelNotFoundError: a package is not installed.
        ModelFormatError: the model needs other parts than this release knows.
        DigestMismatchError: a package holds other weights.
        OutputError: the cache can't be written.
    """
    target = cache_folder() / "completed" / identity.digest.removeprefix("sha256:")[:32]
    with suppress(ModelError):
        verify_manifest(target)
        return target
    vocoder, text = read_ready_made(folder, identity.name)
    with replaced_folder(target) as temporary, quiet_loading():
        for path in model_files(folder):
            copy = temporary / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, copy)
        vocoder.half().save_pretrained(temporary / "vocoder")
        text.encoder.half().save_pretrained(temporary / "text_encoder")
        text.tokenizer.save_pretrained(temporary / "tokenizer")
        write_manifest(temporary, identity.name, identity.version, identity.license)
    return target
