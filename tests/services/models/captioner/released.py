"""A tiny SLAM-AAC in the released formats: EAT's fairseq file, ``model.pt``, a language model's folder."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

FIXTURES = Path(__file__).parents[3] / "fixtures" / "captioning"
"""References and weights; its README says where they come from."""

CAPTIONS = ["A tone rings", "A higher tone fades while noise hisses"]
"""Captions of the two clips in training."""


def references() -> dict[str, NDArray[Any]]:
    """Every array of `references.npz`."""
    with np.load(FIXTURES / "references.npz") as arrays:
        return dict(arrays)


def eat_weights() -> dict[str, Tensor]:
    return load_file(FIXTURES / "eat_tiny.safetensors")


def projector_weights() -> dict[str, Tensor]:
    return load_file(FIXTURES / "projector_tiny.safetensors")


def oracle_tokenizer() -> PreTrainedTokenizerFast:
    """Characters to ``3 + ord(c) % 61``, after the beginning 1."""
    vocabulary = {chr(code): 3 + code % 61 for code in range(32, 93)}
    others = [(chr(code), chr(code - 61)) for code in range(93, 127)]
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **vocabulary}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(*pair) for pair in (*others, ("\n", chr(10 + 61)))]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def write_language_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(FIXTURES / "llama_tiny.safetensors", folder / "model.safetensors")
    shutil.copy(FIXTURES / "llama_tiny_config.json", folder / "config.json")
    # As Vicuna's: settings that transformers refuses to save.
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    oracle_tokenizer().save_pretrained(folder)
    return folder


def write_eat(path: Path, weights: dict[str, Any] | None = None) -> Path:
    """Write a fairseq file: ``cfg`` holds objects of a module that is not there when the file is read."""
    name = "omegaconf_stand_in"
    module = ModuleType(name)

    class DictConfig(dict[str, Any]):
        """Pickles as omegaconf's class does: by its module, with a state."""

        def __reduce_ex__(self, _: Any) -> Any:
            return DictConfig, (), {"_content": dict(self)}, None, iter(self.items())

    DictConfig.__module__, DictConfig.__qualname__ = name, "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    sys.modules[name] = module
    try:
        config = DictConfig(model=DictConfig(num_heads=4), task=None)
        torch.save({"cfg": config, "model": eat_weights() if weights is None else weights}, path)
    finally:
        del sys.modules[name]
    return path


def write_released(folder: Path) -> Path:
    """Write ``eat.pt``, ``model.pt`` and ``llm/`` into a new folder, and return that."""
    folder.mkdir(parents=True)
    write_eat(folder / "eat.pt")
    torch.save(projector_weights(), folder / "model.pt")
    write_language_model(folder / "llm")
    return folder


class Exploit:
    """Runs code when it is unpickled: writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def write_legacy(path: Path, data: Any) -> Path:
    """Write a checkpoint in the format before zip files."""
    torch.save(data, path, _use_new_zipfile_serialization=False, pickle_protocol=pickle.DEFAULT_PROTOCOL)
    return path
