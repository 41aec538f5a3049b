"""Latents of clips and embeddings of prompts, made once and kept on disk by content.

Autoencoder and text encoder are frozen while a denoiser learns. So they are loaded, do their work and are
let go; the training itself has only the denoiser on the device.

Shape legend: B batch, C latent channels, T latent frames, F latent mel bins, L text tokens, D text width,
N samples.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.audio.resampling import resample
from services.errors import OutputError
from services.models.clap.model import Waveform
from services.models.folders import DTYPES
from services.models.manifest import read_manifest
from services.models.mel import LogMel, mel_frames
from services.models.tango.loading import load_tango
from training.data.examples import Clip
from training.loop.progress import progress

CLIPS = 16
"""Clips of one pass through the autoencoder: always as many, so that a clip's latents do not depend, not by a
bit, on how many others are missing."""
PROMPTS = 32
"""Prompts of one pass through the text encoder."""
SHARD = 512
"""Tensors of one file: what a kill may cost."""
TEXT_LENGTH = 64
"""Prompts are padded to a multiple of so many tokens, where the model fixes no length."""

LATENTS_OF = ("vae/", "model_index.json")
EMBEDDINGS_OF = ("text_encoder/", "tokenizer/", "model_index.json")
"""The files of a pipeline that latents, and embeddings, follow from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentConfig:
    """How clips become latents."""

    duration: float | None = None
    """Seconds. Shorter clips get silence after them, longer ones are cut; none: the model's default."""
    normalise: bool = False
    """Take each clip's mean away and bring its peak to one half, as upstream reads clips."""
    dtype: Literal["float16", "float32"] = "float16"
    """What is kept on disk."""
    cache: Path | None = None
    """Folder that several trainings may share; none: the run's own."""
    encode_online: bool = False
    """Keep autoencoder and text encoder at hand and encode at every step instead: to compare."""

    def __post_init__(self) -> None:
        if self.duration is not None and not self.duration > 0:
            raise ValueError(f"duration is {self.duration}, must be above 0")


class TensorCache:
    """Tensors on disk by the digest of what they were made from, read when they are asked for.

    Files hold many of them; each is written whole or not at all, so whatever was finished when a run was
    killed is not done again. Several processes may write to one folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: set[Path] = set()
        self._places: dict[str, Any] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._places[key].get_tensor(key)
        return tensor

    def refresh(self) -> None:
        """Learn what others wrote. A damaged file is as good as none."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._files):
            try:
                file = safe_open(path, framework="pt")
                self._places |= dict.fromkeys(file.keys(), file)
                self._files.add(path)
            except (OSError, SafetensorError):
                path.unlink(missing_ok=True)

    def save(self, made: Mapping[str, Tensor]) -> None:
        """Add tensors. Raises `OutputError` where the disk is full or gone; nothing is left behind then."""
        if not made:
            return
        name = hashlib.sha256(" ".join(sorted(made)).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in made.items()}, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{path} can't be written: {error}; make room, or write elsewhere") from error
        self.refresh()


class Encoder:
    """The frozen parts of a pipeline: sound to latents, prompts to embeddings."""

    def __init__(self, folder: Path, config: LatentConfig, device: torch.device) -> None:
        pipeline = load_tango(folder)
        self.geometry, self.config, self.device = pipeline.geometry, config, device
        self.vae = pipeline.vae.to(device)
        self.scale = float(pipeline.vae.config.scaling_factor)
        pipeline.text_encoder.to(device)
        # What is not needed here would only take memory.
        pipeline.register_modules(unet=None, vae=None, vocoder=None)
        self.pipeline = pipeline
        self.log_mel = LogMel(
            sampling_rate=self.geometry.sampling_rate,
            hop_length=self.geometry.hop_length,
            mel_bins=self.geometry.mel_bins,
        ).to(device)
        frames = self.geometry.latent_frames(config.duration or self.geometry.default_duration)
        self.samples = frames * self.geometry.latent_downsampling * self.geometry.hop_length
        """Of a clip: what the latents of its duration hold."""

    @torch.no_grad()
    def latents(self, clips: Sequence[tuple[Waveform, int]]) -> Tensor:
        """Scaled latents [B, C, T, F] of waveforms and their rates: the means of the posteriors."""
        found = []
        for part in _parts(clips, CLIPS):
            waveform_BN = np.zeros((CLIPS, self.samples), dtype=np.float32)
            for row, (waveform, rate) in zip(waveform_BN, part, strict=False):
                self._fit(waveform, rate, row)
            mel_B1TM = mel_frames(torch.from_numpy(waveform_BN).to(self.device), self.log_mel)
            mean_BCTF = self.vae.encode(mel_B1TM).latent_dist.mean * self.scale
            found.append(mean_BCTF[: len(part)].to(DTYPES[self.config.dtype]).cpu())
        return torch.cat(found)

    def text_length(self, prompt: str) -> int:
        """Tokens that a prompt is padded to."""
        if self.pipeline.config.text_length:
            return int(self.pipeline.config.text_length)
        blocks = -(-self.pipeline.token_count(prompt) // TEXT_LENGTH)
        return min(blocks * TEXT_LENGTH, self.geometry.max_prompt_tokens)

    def embeddings(self, prompts: Sequence[str]) -> list[Tensor]:
        """Hidden states [L, D] of each prompt, without the padding."""
        found: dict[str, Tensor] = {}
        by_length: dict[int, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            by_length.setdefault(self.text_length(prompt), []).append(prompt)
        for length, alike in by_length.items():
            for part in _parts(alike, PROMPTS):
                padded = [*part, *[""] * (PROMPTS - len(part))]
                made = self.pipeline.encode_prompt(padded, length=length)
                for prompt, hidden_LD, mask_L in zip(part, made.embeds_BLD, made.mask_BL, strict=False):
                    found[prompt] = hidden_LD[mask_L].to(DTYPES[self.config.dtype]).cpu()
        return [found[prompt] for prompt in prompts]

    def _fit(self, waveform: Waveform, rate: int, row_N: NDArray[np.float32]) -> None:
        """Write a clip into a row of silence: mono, at the model's rate, cut to its length."""
        mono = waveform.mean(0) if waveform.ndim == 2 else waveform
        mono = resample(np.asarray(mono, dtype=np.float32), rate, self.geometry.sampling_rate)
        if self.config.normalise:
            mono = mono - mono.mean()
            mono = mono * np.float32(0.5 / max(1e-8, float(np.abs(mono).max())))
        mono = mono[: len(row_N)]
        row_N[: len(mono)] = mono


class Latents:
    """What a training reads of clips and prompts: from disk, or made afresh where that is wanted."""

    def __init__(self, cache: Path, folder: Path, config: LatentConfig, accelerator: Accelerator) -> None:
        """`folder` is the pipeline's, whose autoencoder and text encoder make what is kept in `cache`."""
        self.folder, self.config, self.accelerator = folder, config, accelerator
        files = read_manifest(folder).files
        self._clips = TensorCache(
            cache / f"latents-{_name(files, LATENTS_OF, config.duration, config.normalise, config.dtype)}"
        )
        self._prompts = TensorCache(cache / f"prompts-{_name(files, EMBEDDINGS_OF, config.dtype)}")
        self._digests: dict[Clip, str] = {}
        self._encoder: Encoder | None = None
        self._length = 0

    def add(self, clips: Iterable[Clip], prompts: Iterable[str]) -> dict[Clip, str]:
        """Make ready clips and prompts; what is missing is shared out among the processes.

        Returns the clips that can't be read, and why.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        wanted = list(dict.fromkeys(clips))
        texts = sorted({"", *prompts})
        unreadable: dict[int, str] = {}
        missing: dict[str, int] = {}
        for number in range(rank, len(wanted), processes):
            clip = wanted[number]
            try:
                self._digests[clip] = digest = clip.digest
            except (OSError, ValueError) as error:
                unreadable[number] = _reason(error)
                continue
            if digest not in self._clips:
                missing.setdefault(digest, number)
        unknown = [text for text in texts[rank::processes] if _text_key(text) not in self._prompts]
        if not self.config.encode_online:
            self._encode_prompts(unknown)
            self._encode_clips(missing, wanted, unreadable)
            self._encoder = None
        self.accelerator.wait_for_everyone()
        if processes > 1:
            own = {number: self._digests.get(clip) for number, clip in enumerate(wanted)}
            everywhere = gather_object([(unreadable, own)])
            unreadable = {n: reason for there, _ in everywhere for n, reason in there.items()}
            for _, there in everywhere:
                self._digests |= {wanted[n]: digest for n, digest in there.items() if digest}
        self._clips.refresh()
        self._prompts.refresh()
        if self.config.encode_online:
            self._length = max(self.encoder.text_length(text) for text in texts)
            return {wanted[number]: reason for number, reason in sorted(unreadable.items())}
        self._length = max(len(self._prompts[_text_key(text)]) for text in texts)
        # What one clip's content is not readable for, that of its copies is not either.
        reasons = {self._digests.get(wanted[number]): reason for number, reason in unreadable.items()}
        found = {clip: self._digests.get(clip) for clip in wanted}
        return {
            clip: unreadable.get(number) or reasons[digest]
            for number, (clip, digest) in enumerate(found.items())
            if digest is None or digest not in self._clips
        }

    @property
    def encoder(self) -> Encoder:
        """The frozen parts, loaded when they are first needed."""
        if self._encoder is None:
            self._encoder = Encoder(self.folder, self.config, self.accelerator.device)
        return self._encoder

    def clips(self, clips: Sequence[Clip]) -> Tensor:
        """Latents [B, C, T, F] of clips that were added: float32, on the device."""
        with self._full_precision():
            if self.config.encode_online:
                latents_BCTF = self.encoder.latents([clip.read() for clip in clips])
            else:
                latents_BCTF = torch.stack([self._clips[self._digests[clip]] for clip in clips])
        return latents_BCTF.to(self.accelerator.device).float()

    def text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] (float32) and mask [B, L] of prompts that were added, on the device.

        L is the longest of all that were added, so that a batch has one shape, however it is split up.
        """
        if self.config.encode_online:
            with self._full_precision():
                rows = self.encoder.embeddings(prompts)
        else:
            rows = [self._prompts[_text_key(prompt)] for prompt in prompts]
        embeds_BLD = torch.zeros(len(rows), self._length, rows[0].shape[-1])
        mask_BL = torch.zeros(len(rows), self._length, dtype=torch.bool)
        for number, row_LD in enumerate(rows):
            embeds_BLD[number, : len(row_LD)] = row_LD.float()
            mask_BL[number, : len(row_LD)] = True
        return embeds_BLD.to(self.accelerator.device), mask_BL.to(self.accelerator.device)

    def _full_precision(self) -> torch.autocast:
        """A training step's mixed precision is not for what is frozen (and on a CPU refuses float16)."""
        return torch.autocast(self.accelerator.device.type, enabled=False)

    def _encode_prompts(self, unknown: Sequence[str]) -> None:
        for part in _parts(unknown, SHARD):
            made = self.encoder.embeddings(part)
            self._prompts.save({_text_key(text): tensor for text, tensor in zip(part, made, strict=True)})

    def _encode_clips(
        self, missing: Mapping[str, int], wanted: Sequence[Clip], unreadable: dict[int, str]
    ) -> None:
        """Encode clips by digest; what can't be read is put into `unreadable`."""
        # In the order of the data, so that what lies side by side on disk is read once.
        todo = sorted(missing.items(), key=lambda item: item[1])
        bar = progress(
            total=len(todo), desc="latents", unit="clip", disable=self.accelerator.process_index > 0
        )
        with bar:
            for shard in _parts(todo, SHARD):
                made: dict[str, Tensor] = {}
                for part in _parts(shard, CLIPS):
                    read: dict[str, tuple[Waveform, int]] = {}
                    for digest, number in part:
                        try:
                            read[digest] = wanted[number].read()
                        except (OSError, ValueError) as error:
                            unreadable[number] = _reason(error)
                    if read:
                        latents_BCTF = self.encoder.latents(list(read.values()))
                        made |= {digest: row.clone() for digest, row in zip(read, latents_BCTF, strict=True)}
                    bar.update(len(part))
                self._clips.save(made)


def _parts(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _text_key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def _name(files: Mapping[str, str], parts: tuple[str, ...], *settings: object) -> str:
    """Sixteen digits that stand for everything that what is kept follows from."""
    relevant = {path: sha for path, sha in files.items() if path.startswith(parts)}
    return hashlib.sha256(json.dumps([sorted(relevant.items()), settings]).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0]
