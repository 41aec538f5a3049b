"""`load_clap`: a Hugging Face folder becomes a `ClapModel`, or is refused in one line.

Nothing in a folder is executed: classes are fixed, weights come from safetensors alone, and every key and
shape is compared with the model before anything is loaded. `services.models.clap.laion` reads LAION's own.
"""

from pathlib import Path
from typing import Any, Final

import torch
import transformers

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.clap.model import PADDINGS, ClapModel
from services.models.folders import one_line, pick_device, read_json, read_shapes
from services.models.state_dicts import check_weights, on_meta, quiet_loading

ARCHITECTURE: Final = "ClapModel"

BUFFERS: Final = ("text_model.embeddings.position_ids", "text_model.embeddings.token_type_ids")
"""Counters that old files hold or lack; they carry no weights."""

_SMALLEST_SHARE: Final = 0.9
"""Share of the text encoder's vocabulary that its tokenizer must know: made without its files, transformers'
tokenizers come up with a handful of tokens and no error."""


def load_clap(folder: Path, *, device: str = "cpu") -> ClapModel:
    """The CLAP model in `folder`, in float32 on `device` (torch's name, or ``auto``), ready for inference.

    Raises `ModelNotFoundError` for a missing folder, `ModelFormatError` for one that is something else
    (another architecture, truncated or missing weights, a pickle payload, a tokenizer of another vocabulary),
    `InvalidInputError` for a device that does not exist.
    """
    target = pick_device(device)
    config = clap_config(folder)
    check_clap_folder(folder, config)
    try:
        with quiet_loading():
            clap = transformers.ClapModel.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            extractor = transformers.ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
        check_extractor(folder, config.audio_config, extractor)
    except ModelFormatError:
        raise
    except Exception as error:  # whatever the library raises here, the folder is to blame
        raise ModelFormatError(f"{folder} can't be loaded: {one_line(error)}") from error
    tokenizer = load_tokenizer(folder, clap.config.text_config.vocab_size)
    model = ClapModel(clap, tokenizer, extractor)
    return model.to(target).eval().requires_grad_(False)


def clap_config(folder: Path) -> transformers.ClapConfig:
    """The configuration in `folder`."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the path of a CLAP model folder")
    data = read_json(folder / "config.json")
    if data.get("model_type") != "clap":
        raise ModelFormatError(
            f"{folder} holds a {data.get('model_type') or data.get('_class_name')}, not a CLAP model; "
            "give a folder that transformers.ClapModel.save_pretrained wrote"
        )
    return build_config(data, folder)


def build_config(data: dict[str, Any], folder: Path) -> transformers.ClapConfig:
    """transformers' configuration of `data`; `ModelFormatError` where it refuses it."""
    try:
        return transformers.ClapConfig(**data)
    except Exception as error:  # validation of strict dataclasses raises several classes
        raise ModelFormatError(f"{folder}/config.json is not valid: {one_line(error)}") from error


def check_clap_folder(folder: Path, config: transformers.ClapConfig) -> None:
    """Raise `ModelFormatError` unless `folder` holds all of a CLAP model, unloaded."""
    read_json(folder / "preprocessor_config.json")
    try:
        with quiet_loading():
            module = on_meta(lambda: transformers.ClapModel(config))
    except Exception as error:  # a config that its own class refuses
        raise ModelFormatError(f"{folder}/config.json is not valid: {one_line(error)}") from error
    shapes = read_shapes(folder)
    own = module.state_dict()
    for buffer in BUFFERS:
        if buffer in own:
            shapes.setdefault(buffer, tuple(own[buffer].shape))
        else:
            shapes.pop(buffer, None)
    check_weights(str(folder), module, shapes)


def check_extractor(
    folder: Path, audio: transformers.ClapAudioConfig, extractor: transformers.ClapFeatureExtractor
) -> None:
    """Raise `ModelFormatError` unless the spectrograms of `extractor` are what the audio encoder takes.

    They can be of its size and yet of the other bank of filters: fused and unfused models have one each.
    """
    wanted = "fusion" if audio.enable_fusion else "rand_trunc"
    faults = [
        f"{name} is {value!r}, not {known}"
        for name, value, known, holds in (
            ("sampling_rate", extractor.sampling_rate, "positive", extractor.sampling_rate > 0),
            ("padding", extractor.padding, f"one of {PADDINGS}", extractor.padding in PADDINGS),
            ("truncation", extractor.truncation, repr(wanted), extractor.truncation == wanted),
            (
                "feature_size",
                extractor.feature_size,
                f"the model's {audio.num_mel_bins}",
                extractor.feature_size == audio.num_mel_bins,
            ),
        )
        if not holds
    ]
    frames = extractor.nb_max_samples // max(extractor.hop_length, 1) + 1
    most = audio.spec_size * (audio.spec_size // audio.num_mel_bins)
    if not 1 < frames <= most:
        faults.append(f"a window has {frames} frames, and the model takes 2 to {most}")
    if faults:
        raise ModelFormatError(f"{folder}/preprocessor_config.json is not this model's: {'; '.join(faults)}")


def load_tokenizer(folder: Path, vocabulary: int) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `folder`, which must know `vocabulary` tokens.

    Raises `ModelFormatError` where there is none, or one of another vocabulary.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the folder of the text encoder's tokenizer")
    try:
        with quiet_loading():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # no files, broken files: several libraries' errors
        raise ModelFormatError(f"{folder} holds no tokenizer: {one_line(error)}") from error
    known = len(tokenizer)
    if not _SMALLEST_SHARE * vocabulary <= known <= vocabulary:
        raise ModelFormatError(
            f"{folder}: its tokenizer knows {known} tokens, and the text encoder {vocabulary}; "
            "its files (tokenizer.json, or vocab.json and merges.txt) are missing or another model's"
        )
    if tokenizer.pad_token_id is None:
        raise ModelFormatError(f"{folder}: its tokenizer has no pad_token")
    return tokenizer
