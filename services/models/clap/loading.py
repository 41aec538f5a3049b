"""`load_clap`: load a `ClapModel` from a Hugging Face folder.

Folders are untrusted. Nothing in them is executed: classes are fixed, weights come only from safetensors, and
every key and shape is compared with the model before anything is loaded. `services.models.clap.laion` loads
LAION's own checkpoints.
"""

from pathlib import Path
from typing import Any, Final

import torch
import transformers

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.clap.model import PADDINGS, ClapModel
from services.models.folders import cause, one_line, pick_device, read_json, read_layout
from services.models.state_dicts import check_finite, check_weights, on_meta, quiet_loading
from services.models.words import load_tokenizer

ARCHITECTURE: Final = "ClapModel"

BUFFERS: Final = ("text_model.embeddings.position_ids", "text_model.embeddings.token_type_ids")
"""Index buffers that old files may lack; they hold no weights."""


def load_clap(folder: Path, *, device: str = "cpu") -> ClapModel:
    """Load the CLAP model in `folder` for inference, in float32 on `device` (torch's name, or ``auto``).

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFormatError: the folder has another architecture, truncated or missing weights, a pickle payload,
            or a tokenizer with another vocabulary.
        InvalidInputError: the device does not exist.
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
    except Exception as error:  # any exception of the library means that the folder is invalid
        raise ModelFormatError(f"{folder} can't be loaded: {cause(folder, error)}") from error
    tokenizer = load_tokenizer(folder, clap.config.text_config.vocab_size)
    check_finite(str(folder), clap.state_dict())
    model = ClapModel(clap, tokenizer, extractor)
    return model.to(target).eval().requires_grad_(False)


def clap_config(folder: Path) -> transformers.ClapConfig:
    """Return the configuration in `folder`. Raises `ModelNotFoundError` or `ModelFormatError`."""
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
    """Return transformers' configuration for `data`. Raises `ModelFormatError` if it is not valid."""
    try:
        return transformers.ClapConfig(**data)
    except Exception as error:  # validation of strict dataclasses raises several classes
        raise ModelFormatError(f"{folder}/config.json is not valid: {one_line(error)}") from error


def check_clap_folder(folder: Path, config: transformers.ClapConfig) -> None:
    """Raise `ModelFormatError` unless `folder` holds a complete CLAP model. Loads no weights."""
    read_json(folder / "preprocessor_config.json")
    try:
        with quiet_loading():
            module = on_meta(lambda: transformers.ClapModel(config))
    except Exception as error:  # a config that its own class refuses
        raise ModelFormatError(f"{folder}/config.json is not valid: {one_line(error)}") from error
    layout = read_layout(folder)
    own = module.state_dict()
    for buffer in BUFFERS:
        if buffer in own:
            layout.setdefault(buffer, own[buffer])
        else:
            layout.pop(buffer, None)
    check_weights(str(folder), module, layout)


def check_extractor(
    folder: Path, audio: transformers.ClapAudioConfig, extractor: transformers.ClapFeatureExtractor
) -> None:
    """Raise `ModelFormatError` unless the spectrograms of `extractor` fit the audio encoder.

    `truncation` must match too, since it selects the filter bank: fused and unfused models have different
    ones.
    """
    truncation = "fusion" if audio.enable_fusion else "rand_trunc"
    faults = [
        f"{name} is {value!r}, not {known}"
        for name, value, known, holds in (
            ("sampling_rate", extractor.sampling_rate, "positive", extractor.sampling_rate > 0),
            ("padding", extractor.padding, f"one of {PADDINGS}", extractor.padding in PADDINGS),
            ("truncation", extractor.truncation, repr(truncation), extractor.truncation == truncation),
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
        faults.append(f"a window has {frames} frames, but the model takes 2 to {most}")
    if faults:
        raise ModelFormatError(f"{folder}/preprocessor_config.json is not this model's: {'; '.join(faults)}")
