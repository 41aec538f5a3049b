"""The spaces that sets of clips are compared in: ``tagger:URI``, ``clap:URI``, ``panns:PATH``.

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
from services.errors import ModelFormatError
from services.local import Loaded
from services.models.clap.model import ClapModel, EmbeddingModel, Waveform
from services.models.folders import pick_device, read_json, read_shapes
from services.models.mini.tagger import Detection, EventTagger
from services.models.reward.model import RewardModel, load_reward
from services.models.state_dicts import check_weights, on_meta
from services.weights.loading import load_embedding_model
from services.weights.uri import resolve
from training.data.store import file_digest, invalid
from training.evaluation.panns import Cnn14, load_panns


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """A mono clip."""

    waveform_N: Waveform
    """Samples in [-1, 1]."""
    sampling_rate: int
    """Hertz."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embeddings:
    """What an embedder makes of clips."""

    embeddings_BD: NDArray[np.float32]
    logits_BK: NDArray[np.float32] | None
    """Of its classes, before softmax or sigmoid; None where it has no classes."""


class Embedder(Protocol):
    """Clips to points of a space."""

    @property
    def digest(self) -> str:
        """Of the weights."""

    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """Embed clips, one at least, of any lengths and sampling rates."""


@dataclass(frozen=True, slots=True, eq=False)
class PannsEmbedder:
    """CNN14: what FD, KL and IS of text-to-audio papers are taken from."""

    model: Cnn14
    digest: str

    @torch.inference_mode()
    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """See `Embedder`."""
        device = self.model.fc1.weight.device
        rows: list[tuple[Tensor, Tensor]] = []
        for batch_BN in same_lengths(clips, self.model.variant.sampling_rate):
            heard = self.model(batch_BN.to(device))
            rows += zip(heard.embeddings_BD.cpu(), heard.logits_BK.cpu(), strict=True)
        embeddings, logits = zip(*rows, strict=True)
        return Embeddings(
            embeddings_BD=torch.stack(embeddings).numpy(), logits_BK=torch.stack(logits).numpy()
        )


@dataclass(frozen=True, slots=True, eq=False)
class ClapEmbedder:
    """A CLAP model's audio side. It has no classes."""

    model: EmbeddingModel
    digest: str

    def embed(self, clips: Sequence[Sound]) -> Embeddings:
        """See `Embedder`."""
        windows = [self.model.prepare(clip.waveform_N, clip.sampling_rate) for clip in clips]
        return Embeddings(embeddings_BD=self.model.embed_windows(windows).numpy(), logits_BK=None)


@dataclass(frozen=True, slots=True, eq=False)
class TaggerEmbedder:
    """The mini tagger: its recurrent state averaged over time, and each class's logit where it is highest."""

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
            batches = same_lengths(clips, self.model.config.sampling_rate)
            logits = [self.model(batch_BN.to(device)).amax(dim=1).cpu() for batch_BN in batches]
        finally:
            hook.remove()
        return Embeddings(embeddings_BD=torch.cat(hidden).numpy(), logits_BK=torch.cat(logits).numpy())

    def detect(self, clips: Sequence[Sound]) -> list[dict[str, Detection]]:
        """The events of each clip."""
        device = self.model.head.weight.device
        found: list[dict[str, Detection]] = []
        for batch_BN in same_lengths(clips, self.model.config.sampling_rate):
            found += self.model.detect(batch_BN.to(device))
        return found


def same_lengths(clips: Sequence[Sound], target_rate: int) -> list[Tensor]:
    """Clips at `target_rate` in batches [B, N], in order: neighbours of one length go together."""
    batches: list[list[Waveform]] = []
    for clip in clips:
        heard = resample(clip.waveform_N, clip.sampling_rate, target_rate)
        if batches and len(batches[-1][0]) == len(heard):
            batches[-1].append(heard)
        else:
            batches.append([heard])
    return [torch.from_numpy(np.stack(batch)).float() for batch in batches]


def load_tagger(uri: str, device: str = "cpu") -> TaggerEmbedder:
    """The mini tagger of a URI. Raises `ModelError` where it was refused."""
    target = pick_device(device)
    resolved = resolve(uri)
    config = read_json(resolved.folder / "config.json")
    if config.get("_class_name") != EventTagger.__name__:
        raise ModelFormatError(f"{resolved.folder} holds no {EventTagger.__name__}; give mini:tagger")
    module = on_meta(lambda: EventTagger.from_config(config))
    check_weights(str(resolved.folder), module, read_shapes(resolved.folder))
    tagger = EventTagger.from_pretrained(resolved.folder, local_files_only=True, use_safetensors=True)
    return TaggerEmbedder(tagger.float().to(target).eval().requires_grad_(False), resolved.digest)


class Loader:
    """Loads each model once."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.clap = functools.cache(self._clap)
        self.tagger = functools.cache(self._tagger)

    def embedder(self, text: str) -> Embedder:
        """Load the embedder of ``KIND:LOCATION``. Raises `ModelError` where its weights were refused."""
        kind, _, location = text.partition(":")
        match kind:
            case "tagger":
                return self.tagger(location)
            case "clap":
                loaded = self.clap(location)
                return ClapEmbedder(loaded.model, loaded.version.digest)
            case _:
                path = Path(location).expanduser()
                return PannsEmbedder(load_panns(path, self.device), f"sha256:{file_digest(path)}")

    def reward(self, uri: str, clap: str) -> Loaded[RewardModel]:
        """Load a reward model, and the CLAP model that it was trained on unless it is loaded already."""
        tokens = self.clap(clap)
        if not isinstance(tokens.model, ClapModel):
            raise invalid("clap", f"is {clap}, which gives embeddings and no tokens; give laion:PATH")
        model = resolve(uri)
        reward = load_reward(model.folder, tokens.model, tokens.version.digest)
        return Loaded(model=reward, version=model.identity)

    def _clap(self, uri: str) -> Loaded[EmbeddingModel]:
        model = resolve(uri)
        return Loaded(model=load_embedding_model(model, self.device), version=model.identity)

    def _tagger(self, uri: str) -> TaggerEmbedder:
        return load_tagger(uri, self.device)
