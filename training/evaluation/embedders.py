"""Embedding models of clips: ``tagger:URI``, ``clap:URI``, ``yamnet:PATH``, ``panns:PATH``,
``passt:PATH``.

Shape legend: B clips, N samples, S segments, H hidden width, D embedding width, K classes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.audio.resampling import resample
from services.errors import ModelFormatError, invalid
from services.local import Loaded
from services.models.clap.model import ClapModel, EmbeddingModel, Waveform
from services.models.folders import pick_device, read_json, read_layout
from services.models.mini.tagger import Detection, EventTagger
from services.models.reward.model import RewardModel, load_reward
from services.models.state_dicts import check_finite, check_weights, on_meta
from services.weights.loading import load_embedding_model
from services.weights.uri import resolve
from training.data.store import file_digest
from training.evaluation.panns import Cnn14, load_panns
from training.evaluation.passt import Passt, load_passt
from training.evaluation.yamnet import Yamnet, load_yamnet


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """A mono waveform and its sampling rate."""

    waveform_N: Waveform
    """Samples in [-1, 1]."""
    sampling_rate: int
    """Hertz."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embeddings:
    """Embeddings of clips and, if the model has classes, their logits."""

    embeddings_BD: NDArray[np.float32]
    logits_BK: NDArray[np.float32] | None
    """Logits before softmax or sigmoid; None if the model has no classes."""


class Embedder(Protocol):
    """An embedding model."""

    @property
    def digest(self) -> str:
        """Digest of the weights."""

    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """Return the embeddings of one or more clips, of any lengths and sampling rates."""


@dataclass(frozen=True, slots=True, eq=False)
class AudioSetEmbedder:
    """A tagger of AudioSet's classes behind FD, KL and IS in papers on text-to-audio: CNN14 or PaSST."""

    model: Cnn14 | Passt
    digest: str

    @torch.inference_mode()
    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """See `Embedder`."""
        device = next(self.model.parameters()).device
        rows: list[tuple[Tensor, Tensor]] = []
        for batch_BN in batch_by_length(clips, self.model.sampling_rate):
            output = self.model(batch_BN.to(device))
            rows += zip(output.embeddings_BD.cpu(), output.logits_BK.cpu(), strict=True)
        embeddings, logits = zip(*rows, strict=True)
        return Embeddings(
            embeddings_BD=torch.stack(embeddings).numpy(), logits_BK=torch.stack(logits).numpy()
        )


@dataclass(frozen=True, slots=True, eq=False)
class ClapEmbedder:
    """The audio encoder of a CLAP model. It has no classes."""

    model: EmbeddingModel
    digest: str

    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """See `Embedder`."""
        windows = [self.model.prepare(clip.waveform_N, clip.sampling_rate) for clip in clips]
        return Embeddings(embeddings_BD=self.model.embed_windows(windows).numpy(), logits_BK=None)


@dataclass(frozen=True, slots=True, eq=False)
class TaggerEmbedder:
    """The mini tagger: its hidden state averaged over time, and the maximum of each logit over time."""

    model: EventTagger
    digest: str

    @torch.inference_mode()
    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """See `Embedder`."""
        device = self.model.head.weight.device
        hidden: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
            hidden.append(inputs[0].mean(dim=1).cpu())  # [B, S, H] to [B, H]

        hook = self.model.head.register_forward_pre_hook(keep)
        try:
            batches = batch_by_length(clips, self.model.config.sampling_rate)
            logits = [self.model(batch_BN.to(device)).amax(dim=1).cpu() for batch_BN in batches]
        finally:
            hook.remove()
        return Embeddings(embeddings_BD=torch.cat(hidden).numpy(), logits_BK=torch.cat(logits).numpy())

    def detect(self, clips: Sequence[Sound]) -> list[dict[str, Detection]]:
        """Return the detected events of each clip, by class."""
        device = self.model.head.weight.device
        found: list[dict[str, Detection]] = []
        for batch_BN in batch_by_length(clips, self.model.config.sampling_rate):
            found += self.model.detect(batch_BN.to(device))
        return found


def batch_by_length(clips: Sequence[Sound], target_rate: int) -> list[Tensor]:
    """Return clips, resampled to `target_rate`, in batches [B, N] of consecutive clips of one length."""
    batches: list[list[Waveform]] = []
    for clip in clips:
        waveform = resample(clip.waveform_N, clip.sampling_rate, target_rate)
        if batches and len(batches[-1][0]) == len(waveform):
            batches[-1].append(waveform)
        else:
            batches.append([waveform])
    return [torch.from_numpy(np.stack(batch)).float() for batch in batches]


def load_tagger(uri: str, device: str = "cpu") -> TaggerEmbedder:
    """Load a mini tagger from a URI. Raises `ModelError`."""
    target = pick_device(device)
    resolved = resolve(uri)
    config = read_json(resolved.folder / "config.json")
    if config.get("_class_name") != EventTagger.__name__:
        raise ModelFormatError(f"{resolved.folder} holds no {EventTagger.__name__}; give mini:tagger")
    module = on_meta(lambda: EventTagger.from_config(config))
    check_weights(str(resolved.folder), module, read_layout(resolved.folder))
    tagger = EventTagger.from_pretrained(resolved.folder, local_files_only=True, use_safetensors=True)
    check_finite(str(resolved.folder), tagger.state_dict())
    return TaggerEmbedder(tagger.float().to(target).eval().requires_grad_(False), resolved.digest)


@dataclass(frozen=True, slots=True, eq=False)
class YamnetEmbedder:
    """YAMNet: features and logits averaged over a clip's windows. Its classes have sigmoid posteriors."""

    model: Yamnet
    digest: str

    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """See `Embedder`."""
        found = [self.model.windows(clip.waveform_N, clip.sampling_rate) for clip in clips]
        return Embeddings(
            embeddings_BD=np.stack([one.embeddings_WD.mean(axis=0) for one in found]),
            logits_BK=np.stack([one.logits_WK.mean(axis=0) for one in found]),
        )


class Loader:
    """Loads models, each once."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.clap = functools.cache(self._clap)
        self.tagger = functools.cache(self._tagger)

    def embedder(self, text: str) -> Embedder:
        """Load the embedder ``KIND:LOCATION``. Raises `ModelError`."""
        kind, _, location = text.partition(":")
        match kind:
            case "tagger":
                return self.tagger(location)
            case "clap":
                loaded = self.clap(location)
                return ClapEmbedder(loaded.model, loaded.version.digest)
            case "yamnet":
                path = Path(location).expanduser()
                return YamnetEmbedder(load_yamnet(path), f"sha256:{file_digest(path)}")
            case _:
                path = Path(location).expanduser()
                load = load_passt if kind == "passt" else load_panns
                return AudioSetEmbedder(load(path, self.device), f"sha256:{file_digest(path)}")

    def reward(self, uri: str, clap: str) -> Loaded[RewardModel]:
        """Load a reward model and the CLAP model that it was trained on. Raises `ModelError`."""
        tokens = self.clap(clap)
        if not isinstance(tokens.model, ClapModel):
            raise invalid("clap", f"is {clap}, which returns embeddings but no tokens; give laion:PATH")
        model = resolve(uri)
        reward = load_reward(model.folder, tokens.model, tokens.version.digest)
        return Loaded(model=reward, version=model.identity)

    def _clap(self, uri: str) -> Loaded[EmbeddingModel]:
        model = resolve(uri)
        return Loaded(model=load_embedding_model(model, self.device), version=model.identity)

    def _tagger(self, uri: str) -> TaggerEmbedder:
        return load_tagger(uri, self.device)
