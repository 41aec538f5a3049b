"""Sentence embedders for the clustering of captions. Shapes: B sentences, L tokens, D width."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from services.errors import invalid
from services.models.architectures import architecture_of, check_generator
from services.models.folders import pick_device
from services.models.state_dicts import check_finite, quiet_loading
from services.models.words import load_tokenizer, prompt_warnings
from services.weights.loading import load_embedding_model
from services.weights.uri import ResolvedModel, resolve

FORMS: Final = "sentence-transformers:NAME_OR_PATH, tango:MODEL_URI or clap:MODEL_URI"


class Embedder(Protocol):
    """Embeds sentences, similar ones near each other."""

    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Return embeddings [B, D] of length 1."""

    def prompt_warnings(self, prompt: str) -> Sequence[str]:
        """Return what the embedder does not read of a sentence: sentences that begin with ``prompt``."""


def resolve_embedder(name: str) -> ResolvedModel | None:
    """Resolve the model of the embedder called `name`, which is one of `FORMS`; None if that has no URI.

    Raises:
        InvalidInputError: no such name.
        ModelError: the model was refused.
    """
    kind, _, what = name.partition(":")
    if kind not in ("sentence-transformers", *_KINDS) or not what:
        raise invalid("embedder", f"is {name!r}, must be {FORMS}")
    return resolve(what) if kind in _KINDS else None


def embedder_identity(name: str, model: ResolvedModel | None) -> str:
    """Return the identity of an embedder: equal ones give equal embeddings. `model` is its resolved model."""
    return name if model is None else f"{name.partition(':')[0]}:{model.digest}"


def load_embedder(name: str, model: ResolvedModel | None, device: str = "auto") -> Embedder:
    """Load the embedder called `name`. `model` is its resolved model.

    Raises:
        InvalidInputError: its package is not installed.
        ModelError: the model was refused.
    """
    kind, _, what = name.partition(":")
    return SentenceTransformersEmbedder(what, device) if model is None else _KINDS[kind](model, device)


class SentenceTransformersEmbedder:
    """A model of the sentence-transformers package, if that is installed."""

    def __init__(self, name: str, device: str = "auto") -> None:
        try:
            package: Any = importlib.import_module("sentence_transformers")
        except ImportError as error:
            raise invalid(
                "embedder",
                f"is sentence-transformers:{name}, and the package is not installed; "
                "pip install sentence-transformers, or take an embedder that needs none: tango:mini, "
                "clap:mini:clap-a",
            ) from error
        try:
            self._model: Any = package.SentenceTransformer(name, device=str(pick_device(device)))
        except Exception as error:  # the errors of four libraries
            reason = str(error).strip().partition("\n")[0]
            raise invalid(
                "embedder",
                f"{name} can't be loaded: {reason}; give a folder, or a name on the hub with "
                "HF_HUB_OFFLINE=0",
            ) from error

    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder`."""
        vectors = self._model.encode(list(sentences), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def prompt_warnings(self, prompt: str) -> Sequence[str]:
        """See `Embedder`."""
        found = prompt_warnings(self._model.tokenizer, prompt, self._model.max_seq_length)
        return [f"prompt {one}" for one in found]


class TangoEmbedder:
    """The text encoder of a generator (FLAN-T5, or the mini family's): the mean over tokens."""

    def __init__(self, model: ResolvedModel, device: str = "auto") -> None:
        from transformers import T5EncoderModel

        check_generator(model.folder)
        with quiet_loading():
            encoder: Any = T5EncoderModel.from_pretrained(
                model.folder / "text_encoder", use_safetensors=True, local_files_only=True
            )
        check_finite(f"{model.folder}/text_encoder", encoder.state_dict())
        self._model = encoder.to(pick_device(device)).float().eval()
        self._tokenizer = load_tokenizer(model.folder / "tokenizer", encoder.config.vocab_size)
        self.prompt_warnings = architecture_of(model.folder).prompt_reader(model.folder)

    @torch.inference_mode()
    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder`."""
        tokens = self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        device = self._model.device
        mask_BL = tokens["attention_mask"].to(device)
        states_BLD = self._model(input_ids=tokens["input_ids"].to(device), attention_mask=mask_BL)[0]
        sums_BD = (states_BLD * mask_BL[..., None]).sum(1)
        mean_BD = torch.nn.functional.normalize(sums_BD / mask_BL.sum(1, keepdim=True), dim=-1)
        vectors: NDArray[np.float32] = mean_BD.cpu().numpy()
        return vectors


class ClapEmbedder:
    """The text side of a CLAP model."""

    def __init__(self, model: ResolvedModel, device: str = "auto") -> None:
        self._model = load_embedding_model(model, device)

    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder`."""
        vectors: NDArray[np.float32] = self._model.embed_text(sentences).numpy()
        return vectors

    def prompt_warnings(self, prompt: str) -> Sequence[str]:
        """See `Embedder`."""
        return self._model.prompt_warnings(prompt)


_KINDS: Final[Mapping[str, Callable[[ResolvedModel, str], Embedder]]] = MappingProxyType(
    {"tango": TangoEmbedder, "clap": ClapEmbedder}
)
"""Embedders whose weights a model URI names."""
