"""The captioner's language model: transformers' causal language models, with LoRA by peft.

Folders are untrusted: weights come only from safetensors, no code in them runs, and every key and shape is
compared with the model before anything is loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.folders import cause, one_line, read_json, read_layout
from services.models.lora import ADAPTER_WEIGHTS, LoraSettings, read_lora_settings
from services.models.manifest import ADAPTER_CONFIG
from services.models.state_dicts import check_finite, check_layout, check_weights, on_meta, quiet_loading

# ------------------------------------------------------------------------------------ model and tokenizer


def check_language_model(folder: Path) -> int:
    """Return the width of the language model in `folder`, and of its embeddings. Loads no weights.

    Raises `ModelNotFoundError` or `ModelFormatError` unless the folder is complete.
    """
    module = meta_language_model(folder)
    check_weights(str(folder), module, _with_tied(module, read_layout(folder)))
    read_json(folder / "tokenizer_config.json")
    return embedding_width(module)


def meta_language_model(folder: Path) -> nn.Module:
    """Return the model of a folder's `config.json` on the meta device.

    Raises `ModelNotFoundError` or `ModelFormatError`.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; it must hold the language model")
    read_json(folder / "config.json")
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            module: nn.Module = on_meta(
                lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            )
    except Exception as error:  # unknown classes and values that a class refuses raise several errors
        raise ModelFormatError(
            f"{folder}/config.json is not that of a causal language model: {one_line(error)}"
        ) from error
    return module


def load_language_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a checked language model. Raises `ModelFormatError`."""
    try:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # any exception of the library means that the folder is invalid
        raise ModelFormatError(f"{folder} can't be loaded: {cause(folder, error)}") from error
    check_finite(str(folder), model.state_dict())
    return model


def load_caption_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder` of a model with `vocabulary` embeddings.

    Its padding token is the end token, as in upstream. Raises `ModelFormatError` if it has no end token, or
    more tokens than the model: without its files, transformers creates a tokenizer of special tokens.
    """
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # no files, broken files: several libraries' errors
        raise ModelFormatError(f"{folder} holds no tokenizer: {cause(folder, error)}") from error
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(ordinary) < 2:
        raise ModelFormatError(
            f"{folder}: its tokenizer has an empty vocabulary; add tokenizer.json or tokenizer.model"
        )
    if len(tokenizer) > vocabulary:
        raise ModelFormatError(
            f"{folder} has {len(tokenizer)} tokens for {vocabulary} embeddings; tokenizer and weights belong "
            "to different models"
        )
    if tokenizer.eos_token_id is None:
        raise ModelFormatError(f"{folder}: its tokenizer has no eos_token, with which captions end")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_language_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a language model without its adapters, and its tokenizer: a transformers folder (safetensors).

    `dtype` is the float type of the file; None: that of each parameter.
    """
    base = model.get_base_model() if is_adapted(model) else model
    weights = {
        key.replace(".base_layer.", "."): cast_tensor(value, dtype)
        for key, value in base.state_dict().items()
        if ".lora_" not in key
    }
    # Released ones may hold sampling settings that transformers refuses to save; the search reads none.
    base.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_padding()  # the last call's would be saved
        backend.no_truncation()
    with quiet_loading():
        base.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def cast_tensor(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor for a file: contiguous, and in `dtype` if it has floats."""
    floats = dtype is not None and tensor.is_floating_point()
    return tensor.detach().to("cpu", dtype if floats else None).contiguous()


def embedding_width(model: Any) -> int:
    """Return the width of a language model's token embeddings."""
    return int(model.get_input_embeddings().weight.shape[1])


def _with_tied(module: Any, layout: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `layout` with the tensors that a file leaves out because they are another one's."""
    tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    return {**{alias: layout[key] for alias, key in tied.items() if key in layout}, **layout}


# ------------------------------------------------------------------------------------------------- LoRA


def attach_lora(model: Any, lora: LoraSettings) -> Any:
    """Return `model` with new adapters (peft's `PeftModel`), the only parameters that are trained.

    Raises `ModelFormatError` if it has no such layers.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and needed for adapters only

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with quiet_loading():
            return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelFormatError(
            f"LoRA: the language model has no layers {', '.join(lora.modules)}: {one_line(error)}"
        ) from error


def is_adapted(model: object) -> bool:
    """Return whether a language model has adapters."""
    return hasattr(model, "peft_config")


def merge_lora(model: Any) -> Any:
    """Return the language model with its adapters added to its own weights."""
    return model.merge_and_unload()


def load_adapter(model: Any, folder: Path) -> Any:
    """Return `model` with the adapters of a PEFT folder. Raises `ModelFormatError` unless every key fits."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ModelFormatError(f"{folder} has no {ADAPTER_WEIGHTS}; adapters must be safetensors")
    read_layout(folder)
    return apply_adapter(model, read_lora_settings(folder), load_file(path), str(folder))


def apply_adapter(model: Any, lora: LoraSettings, weights: dict[str, Tensor], part: str) -> Any:
    """Return `model` with adapters of these weights, whose keys are those of a PEFT file.

    `part` names the weights in the `ModelFormatError` that is raised unless every key and shape fits.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    adapted = attach_lora(model, lora)
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_layout(part, own, weights)
    check_finite(part, weights)
    set_peft_model_state_dict(adapted, weights)
    return adapted


def save_adapter(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the adapters of `model` as a PEFT folder (safetensors)."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({key: cast_tensor(value, dtype) for key, value in weights.items()}, folder / ADAPTER_WEIGHTS)
    settings = model.peft_config["default"].to_dict()
    settings |= {"base_model_name_or_path": "../language_model", "inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(
        {key: value for key, value in settings.items() if value is not None}, indent=2, default=str
    )
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
