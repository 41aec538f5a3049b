"""Convert SLAM-AAC's checkpoints to a captioner's model folder.

Upstream loads its checkpoint with ``strict=False``, so missing weights pass in silence. Here every key of
every file is accounted for.

* EAT: `services.models.captioner.eat_checkpoint`.
* ``model.pt``: a flat dictionary of what was trained: ``encoder_projector.*``, and with today's upstream the
  adapters ``llm.base_model.model.….lora_A.default.weight``.
* A PEFT folder next to it, as the released checkpoints have: the adapters.
* The language model and its tokenizer, which none of these files has.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.captioner.config import CaptionerConfig
from services.models.captioner.eat import EatConfig
from services.models.captioner.eat_checkpoint import load_eat
from services.models.captioner.language import (
    apply_adapter,
    embedding_width,
    load_caption_tokenizer,
    meta_language_model,
)
from services.models.captioner.model import Captioner, Projector, check_fit, make_projector
from services.models.conversion import Progress, folder_or_hub
from services.models.folders import cause, read_layout, read_pickle
from services.models.lora import ADAPTER_WEIGHTS, LoraSettings, read_lora_settings
from services.models.manifest import write_manifest
from services.models.state_dicts import assign_weights, check_finite, on_meta, quiet_loading, report_faults
from services.models.writing import new_folder

LICENSE: Final = "that of the parts (EAT, the language model, SLAM-AAC's weights: see their model cards)"

PROJECTOR: Final = "encoder_projector."
ADAPTERS: Final = "llm."
"""Beginnings of the keys of ``model.pt``."""

_LANGUAGE_MODEL_FILES: Final = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")
_INV_FREQ: Final = re.compile(r"\.rotary_emb\.inv_freq$")
"""Constants that old Llama checkpoints hold; today's class computes them."""


def convert_captioner(
    eat: Path,
    model: Path,
    target: Path,
    *,
    language_model: str,
    peft: Path | None = None,
    config: CaptionerConfig | None = None,
    heads: int | None = None,
    lora_alpha: float | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    version: str = "1",
    license: str = LICENSE,
) -> Path:
    """Convert SLAM-AAC's checkpoints to a new model folder `target`, and return that.

    Weights keep their values and float types; adapters stay separate. `target` appears only when it is
    complete.

    Args:
        eat: EAT's fairseq file, or a folder in the layout of the Hugging Face hub.
        model: upstream's ``model.pt``.
        target: model folder to create.
        language_model: folder, or ``hf:OWNER/NAME``, with the language model and its tokenizer.
        peft: folder of the adapters, if they are not in `model`.
        config: settings around the models; None: SLAM-AAC's.
        heads: attention heads of EAT; None: as `load_eat` does.
        lora_alpha: alpha of adapters in `model`, which no file states; None: SLAM-AAC's 32.
        progress: called with the name of each stage.
        name: name in the manifest; None: that of the target folder.
        version: version in the manifest.
        license: licence in the manifest.

    Raises:
        ModelNotFoundError: a file or folder does not exist.
        ModelFormatError: keys, shapes or settings are not as expected (lists all), parts do not fit each
            other, or a file holds no weights, or other than finite ones.
        OutputError: `target` exists already or can't be written.
    """
    report = progress or (lambda _: None)
    config = config or CaptionerConfig()
    for path in (eat, model, *([peft] if peft else [])):
        if not path.exists():
            raise ModelNotFoundError(f"{path} does not exist")
    folder = folder_or_hub("language model", language_model, "lmsys/vicuna-7b-v1.5", _LANGUAGE_MODEL_FILES)
    with new_folder(target) as made:
        report("audio encoder")
        encoder = load_eat(eat, heads)
        report("trained weights")
        projector, lora, adapters = read_trained(model, peft, lora_alpha)
        width = embedding_width(meta_language_model(folder))
        config = replace(config, projector_width=_hidden_width(projector) or config.projector_width)
        joined = build_projector(str(model), config, encoder.config, projector, width)
        report("language model")
        llm = load_released_language_model(folder)
        tokenizer = load_caption_tokenizer(folder, len(llm.get_input_embeddings().weight))
        if adapters:
            llm = apply_adapter(llm, lora, adapters, str(peft or model))
        report("model folder")
        Captioner(encoder, joined, llm, tokenizer, config).save_pretrained(made)
        write_manifest(made, name or target.resolve().name, version, license)
    return target


def read_trained(
    model: Path, peft: Path | None, lora_alpha: float | None = None
) -> tuple[dict[str, Tensor], LoraSettings, dict[str, Tensor]]:
    """Return the projector's weights by our keys, the settings of LoRA, and its weights by peft's keys.

    The last are empty without adapters. Raises `ModelFormatError` for unknown keys, and for adapters that are
    in both places.
    """
    weights = _read_tensors(model)
    unknown = [key for key in weights if not key.startswith((PROJECTOR, ADAPTERS))]
    unknown += [key for key in weights if key.startswith(ADAPTERS) and ".lora_" not in key]
    report_faults(str(model), [("unknown keys", unknown)])
    projector = {k.removeprefix(PROJECTOR): v for k, v in weights.items() if k.startswith(PROJECTOR)}
    inside = {
        key.removeprefix(ADAPTERS).replace(".default.", "."): value
        for key, value in weights.items()
        if key.startswith(ADAPTERS)
    }
    if peft is None:
        return projector, _lora_of(str(model), inside, lora_alpha), inside
    if inside:
        raise ModelFormatError(
            f"{model} holds adapters itself ({len(inside)} tensors); leave {peft} out, or give a model.pt "
            "with the projector alone"
        )
    return projector, read_lora_settings(peft), _read_adapters(peft)


def _lora_of(part: str, adapters: Mapping[str, Tensor], alpha: float | None) -> LoraSettings:
    """Return the settings of adapters: rank and layers by their keys and shapes, alpha as given."""
    defaults = LoraSettings()
    if not adapters:
        return defaults
    found = [re.search(r"(\w+)\.lora_A\.weight$", key) for key in adapters]
    modules = tuple(sorted({one[1] for one in found if one}))
    ranks = {tensor.shape[0] for key, tensor in adapters.items() if key.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise ModelFormatError(f"{part}: its adapters have ranks {sorted(ranks)}; one rank is supported")
    return LoraSettings(rank=ranks.pop(), alpha=alpha or defaults.alpha, modules=modules)


def _read_adapters(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        read_layout(folder)
        return load_file(path)
    pickled = folder / "adapter_model.bin"
    if not pickled.is_file():
        raise ModelFormatError(f"{folder} has neither {ADAPTER_WEIGHTS} nor adapter_model.bin")
    return _read_tensors(pickled)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    weights = read_pickle(path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelFormatError(f"{path} is no plain state dictionary; it must map names to tensors")
    check_finite(str(path), weights)
    return weights


def build_projector(
    part: str, config: CaptionerConfig, encoder: EatConfig, weights: Mapping[str, Tensor], width: int
) -> Projector:
    """Return the projector with upstream's weights. Raises `ModelFormatError` unless it fits its
    neighbours and every key matches.
    """
    check_fit(config, encoder, weights, width)
    return assign_weights(part, on_meta(lambda: make_projector(config, encoder, width)), weights)


def _hidden_width(weights: Mapping[str, Tensor]) -> int | None:
    """Return the width of the projector's hidden layer, if the weights have it."""
    bias = weights.get("linear1.bias")
    return None if bias is None else len(bias)


def load_released_language_model(folder: Path) -> Any:
    """Load a language model in the float type of its files: safetensors, or pickles of tensors only.

    Raises `ModelFormatError` unless every key matches.
    """
    try:
        with quiet_loading():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # any exception of the library means that the folder is invalid
        raise ModelFormatError(f"{folder} can't be loaded: {cause(folder, error)}") from error
    faults = (
        ("missing keys", sorted(found["missing_keys"])),
        ("unknown keys", sorted(key for key in found["unexpected_keys"] if not _INV_FREQ.search(key))),
        ("wrong shapes", sorted(str(one[0]) for one in found["mismatched_keys"])),
    )
    report_faults(str(folder), faults)
    check_finite(str(folder), model.state_dict())
    return model
