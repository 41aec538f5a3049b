"""Sentence embedders for the clustering of captions. Shapes: B sentences, L tokens, D width."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from services.errors import invalid
from services.models.architectures import check_generator
from services.models.clap.loading import load_tokenizer
from services.models.folders import pick_device
from services.models.state_dicts import check_finite, quiet_loading
from services.weights.loading import load_embedding_model
from services.weights.uri import ModelURI, resolve

FORMS: Final = "sentence-transformers:NAME_OR_PATH, tango:MODEL_URI or clap:MODEL_URI"


class Embedder(Protocol):
    """Embeds sentences, similar ones near each other."""

    identity: str
    """Identity of the weights: equal ones give equal embeddings."""

    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Return embeddings [B, D] of length 1."""


def load_embedder(name: str, device: str = "auto") -> Embedder:
    """Load the embedder called `name`, which is one of `FORMS`.

    Raises:
        InvalidInputError: no such name, or its package is not installed.
        ModelError: the model was refused.
    """
    kind, _, what = name.partition(":")
    if kind not in _KINDS or not what:
        raise invalid("embedder", f"is {name!r}, must be {FORMS}")
    return _KINDS[kind](what, device)


class SentenceTransformersEmbedder:
    """A model of the sentence-transformers package, if that is installed."""

    def __init__(self, name: str, device: str = "auto") -> None:
        self.identity = f"sentence-transformers:{name}"
        try:
            package: Any = importlib.import_module("sentence_transformers")
        except ImportError as error:
            raise invalid(
                "embedder",
                f"is {self.identity}, and the package is not installed; pip install sentence-transformers, "
                "or take an embedder that needs none: tango:mini, clap:mini:clap-a",
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


class TangoEmbedder:
    """The text encoder of a generator (FLAN-T5, or the mini family's): the mean over tokens."""

    def __init__(self, uri: str, device: str = "auto") -> None:
        from transformers import T5EncoderModel

        found = resolve(ModelURI.parse(uri))
        self.identity = f"tango:{found.digest}"
        check_generator(found.folder)
        with quiet_loading():
            model: Any = T5EncoderModel.from_pretrained(
                found.folder / "text_encoder", use_safetensors=True, local_files_only=True
            )
        check_finite(f"{found.folder}/text_encoder", model.state_dict())
        self._model = model.to(pick_device(device)).float().eval()
        self._tokenizer = load_tokenizer(found.folder / "tokenizer", model.config.vocab_size)

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

    def __init__(self, uri: str, device: str = "auto") -> None:
        model = resolve(uri)
        self.identity = f"clap:{model.digest}"
        self._model = load_embedding_model(model, device)

    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder`."""
        vectors: NDArray[np.float32] = self._model.embed_text(sentences).numpy()
        return vectors


_KINDS: Final[Mapping[str, Callable[[str, str], Embedder]]] = MappingProxyType(
    {
        "sentence-transformers": SentenceTransformersEmbedder,
        "tango": TangoEmbedder,
        "clap": ClapEmbedder,
    }
)


def embedder_identity(name: str) -> str:
    """Return `Embedder.identity` of the embedder called `name`, without loading it."""
    kind, _, what = name.partition(":")
    if kind not in _KINDS or not what:
        raise invalid("embedder", f"is {name!r}, must be {FORMS}")
    return name if kind == "sentence-transformers" else f"{kind}:{resolve(ModelURI.parse(what)).digest}"
