"""Cache of the latents of clips and the encodings of prompts, on disk by content.

Autoencoder and text encoder are frozen while a denoiser is trained. So they are loaded, encode all examples
and are freed; during training only the denoiser is on the device.

Shape legend: B batch, X a family's own shape of latents, N samples.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from services.models.architectures import architecture_of
from services.models.clap.model import Waveform
from services.models.folders import DTYPES
from services.models.latent import Conditioning
from services.models.manifest import read_manifest
from training.data.examples import DECODER, Clip, short_message
from training.loop.checks import ClipSeconds, check_ranges
from training.loop.progress import progress

CLIPS = 16
"""Batch size of the autoencoder. Batches are padded to it, so that the latents of a clip are the same bit for
bit whichever other clips are encoded."""
PROMPTS = 32
"""Batch size of the text encoder; its batches are padded too."""
SHARD = 512
"""Tensors per cache file: at most so many are encoded again after a kill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentConfig:
    """Settings of the encoding of clips."""

    duration: ClipSeconds | None = None
    """Seconds. Shorter clips are padded with silence, longer ones cut; None: the model's default."""
    normalise: bool = False
    """Subtract the mean of each clip and scale its peak to 1/2, as upstream Tango does."""
    normalise_cut: bool = False
    """Scale the peak to 1/2 again after the cut, as upstream does: a clip whose loudest part is cut off gets
    louder."""
    channel: Literal["mean", "first"] = "mean"
    """The mono clip of a stereo one: the mean of its channels, or the first, as upstream takes."""
    posterior: Literal["mean", "sample"] = "mean"
    """What is taken of the autoencoder's posterior: its mean, or with `encode_online` a sample, drawn at each
    step, as upstream does."""
    dtype: Literal["float16", "float32"] = "float16"
    """Data type of cached tensors."""
    cache: Path | None = None
    """Cache folder, which several runs may share; None: in the run's folder."""
    encode_online: bool = False
    """Encode at every step instead of caching, for comparison."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.posterior == "sample" and not self.encode_online:
            raise ValueError("posterior is sample, which needs encode_online; a cache would keep one sample")


class TensorCache:
    """Tensors on disk, by key (the digest of their source), read on access.

    A file contains many tensors and is written atomically, so a resumed run computes only what is missing.
    Several processes may write to one folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: set[Path] = set()
        self._handles: dict[str, Any] = {}
        self.refresh()

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __contains__(self, key: str) -> bool:
        return key in self._handles

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._handles[key].get_tensor(key)
        return tensor

    def refresh(self) -> None:
        """Find the files written by other processes. Damaged files are deleted."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._files):
            try:
                file = safe_open(path, framework="pt")
                self._handles |= dict.fromkeys(file.keys(), file)
                self._files.add(path)
            except (OSError, SafetensorError):
                path.unlink(missing_ok=True)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to a new file. Raises `OutputError`; no partial file is left."""
        if not tensors:
            return
        name = hashlib.sha256(" ".join(sorted(tensors)).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{path} can't be written: {error}; make room, or write elsewhere") from error
        self.refresh()


class Encoder:
    """The frozen encoders of a generator: audio to latents, prompts to conditioning."""

    def __init__(self, folder: Path, config: LatentConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pipeline = architecture_of(folder).load_encoders(folder, device)
        described = self.pipeline.description
        self.sampling_rate = described.geometry.sampling_rate
        self.samples = self.pipeline.latent_samples(config.duration or described.defaults.duration)
        """Number of samples of an encoded clip."""

    @torch.no_grad()
    def latents(self, clips: Sequence[tuple[Waveform, int]]) -> Tensor:
        """Return the latents [B, X] of waveforms with their sampling rates in Hz, on the CPU."""
        found = []
        for part in _parts(clips, CLIPS):
            waveform_BN = np.zeros((CLIPS, self.samples), dtype=np.float32)
            for row, (waveform, rate) in zip(waveform_BN, part, strict=False):
                self._write_row(waveform, rate, row)
            latents_BX = self.pipeline.encode_audio(
                torch.from_numpy(waveform_BN).to(self.device), sample=self.config.posterior == "sample"
            )
            found.append(latents_BX[: len(part)].to(DTYPES[self.config.dtype]).cpu())
        return torch.cat(found)

    def conditioning(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return the conditioning of each prompt by tensor name (see `Conditioning.rows`), on the CPU."""
        found: dict[str, dict[str, Tensor]] = {}
        by_length: dict[int, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            by_length.setdefault(self.pipeline.text_length(prompt), []).append(prompt)
        for length, group in by_length.items():
            for part in _parts(group, PROMPTS):
                padded = [*part, *[""] * (PROMPTS - len(part))]
                rows = self.pipeline.encode(padded, length=length).rows()
                for prompt, row in zip(part, rows, strict=False):
                    found[prompt] = {k: v.to(DTYPES[self.config.dtype]).cpu() for k, v in row.items()}
        return [found[prompt] for prompt in prompts]

    def _write_row(self, waveform: Waveform, rate: int, row_N: NDArray[np.float32]) -> None:
        """Write a clip into a row of silence: mono, at the model's sampling rate, cut to the row's length."""
        if waveform.ndim == 2:
            waveform = waveform[0] if self.config.channel == "first" else waveform.mean(0)
        mono = resample(np.asarray(waveform, dtype=np.float32), rate, self.sampling_rate)
        if self.config.normalise:
            mono = _half_scale(mono - mono.mean())
        mono = mono[: len(row_N)]
        if self.config.normalise_cut:
            mono = _half_scale(mono)
        row_N[: len(mono)] = mono


class Latents:
    """Encoded clips and prompts of a run: cached on disk, or with `encode_online` encoded at every step."""

    def __init__(self, cache: Path, folder: Path, config: LatentConfig, accelerator: Accelerator) -> None:
        """Open the cache folder `cache` for the frozen encoders of the generator in `folder`."""
        self.folder, self.config, self.accelerator = folder, config, accelerator
        architecture, files = architecture_of(folder), read_manifest(folder).files
        self.seconds = config.duration or architecture.default_duration(folder)
        """Duration of every clip in seconds."""
        reading = (config.duration, config.normalise, config.normalise_cut, config.channel)
        audio = _cache_name(files, architecture.encoders, *reading, config.dtype, DECODER)
        self._clips = TensorCache(cache / f"latents-{audio}")
        self._prompts = TensorCache(
            cache / f"conditioning-{_cache_name(files, architecture.readers, config.dtype)}"
        )
        self._digests: dict[Clip, str] = {}
        self._encoder: Encoder | None = None
        self._length = 0
        self._names: list[str] = []

    def add(self, clips: Iterable[Clip], prompts: Iterable[str]) -> dict[Clip, str]:
        """Encode the missing clips and prompts, divided among the processes.

        Returns the unreadable clips with reasons. Raises `OutputError` if the cache can't be written.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        unique = list(dict.fromkeys(clips))
        texts = sorted({"", *prompts})
        unreadable: dict[int, str] = {}
        missing: dict[str, int] = {}
        for number in range(rank, len(unique), processes):
            clip = unique[number]
            try:
                self._digests[clip] = digest = clip.digest
            except (OSError, ValueError) as error:
                unreadable[number] = short_message(error)
                continue
            if digest not in self._clips:
                missing.setdefault(digest, number)
        known = {key.partition(".")[0] for key in self._prompts}
        missing_texts = [text for text in texts[rank::processes] if _text_key(text) not in known]
        if not self.config.encode_online:
            self._encode_prompts(missing_texts)
            self._encode_clips(missing, unique, unreadable)
            self._encoder = None
        self.accelerator.wait_for_everyone()
        if processes > 1:
            own = {number: self._digests.get(clip) for number, clip in enumerate(unique)}
            everywhere = gather_object([(unreadable, own)])
            unreadable = {n: reason for there, _ in everywhere for n, reason in there.items()}
            for _, there in everywhere:
                self._digests |= {unique[n]: digest for n, digest in there.items() if digest}
        self._clips.refresh()
        self._prompts.refresh()
        if self.config.encode_online:
            self._length = max(self.encoder.pipeline.text_length(text) for text in texts)
            return {unique[number]: reason for number, reason in sorted(unreadable.items())}
        self._names = sorted({key.partition(".")[2] for key in self._prompts})
        self._length = max(len(self._row(text)[self._names[0]]) for text in texts)
        # A copy of an unreadable clip is unreadable too.
        reasons = {self._digests.get(unique[number]): reason for number, reason in unreadable.items()}
        found = {clip: self._digests.get(clip) for clip in unique}
        return {
            clip: unreadable.get(number) or reasons[digest]
            for number, (clip, digest) in enumerate(found.items())
            if digest is None or digest not in self._clips
        }

    @property
    def encoder(self) -> Encoder:
        """Return the frozen encoders, loaded on first access."""
        if self._encoder is None:
            self._encoder = Encoder(self.folder, self.config, self.accelerator.device)
        return self._encoder

    def clips(self, clips: Sequence[Clip]) -> Tensor:
        """Return the latents [B, X] of clips that were added, float32 on the device."""
        with self._full_precision():
            if self.config.encode_online:
                latents_BX = self.encoder.latents([clip.read() for clip in clips])
            else:
                latents_BX = torch.stack([self._clips[self._digests[clip]] for clip in clips])
        return latents_BX.to(self.accelerator.device).float()

    def text(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of prompts that were added, float32 on the device.

        It is padded to the longest prompt that was added, so that every part of a batch has the same shape.
        """
        if self.config.encode_online:
            with self._full_precision():
                rows = self.encoder.conditioning(prompts)
        else:
            rows = [self._row(prompt) for prompt in prompts]
        padded = Conditioning.of_rows(rows, self._length)
        return padded.to(self.accelerator.device, torch.float32)

    def _row(self, prompt: str) -> dict[str, Tensor]:
        return {name: self._prompts[f"{_text_key(prompt)}.{name}"] for name in self._names}

    def _full_precision(self) -> torch.autocast:
        """Return a context without mixed precision, whose autocast on a CPU refuses float16."""
        return torch.autocast(self.accelerator.device.type, enabled=False)

    def _encode_prompts(self, prompts: Sequence[str]) -> None:
        for part in _parts(prompts, SHARD):
            encoded = zip(part, self.encoder.conditioning(part), strict=True)
            self._prompts.save({f"{_text_key(text)}.{k}": v for text, row in encoded for k, v in row.items()})

    def _encode_clips(
        self, missing: Mapping[str, int], unique: Sequence[Clip], unreadable: dict[int, str]
    ) -> None:
        """Encode `missing`, indices of clips by digest; add unreadable ones to `unreadable`."""
        # In the order of the data: neighbouring clips share a row group.
        todo = sorted(missing.items(), key=lambda item: item[1])
        bar = progress(
            total=len(todo), desc="latents", unit="clip", disable=self.accelerator.process_index > 0
        )
        with bar:
            for shard in _parts(todo, SHARD):
                latents: dict[str, Tensor] = {}
                for part in _parts(shard, CLIPS):
                    read: dict[str, tuple[Waveform, int]] = {}
                    for digest, number in part:
                        try:
                            read[digest] = unique[number].read()
                        except (OSError, ValueError) as error:
                            unreadable[number] = short_message(error)
                    if read:
                        latents_BX = self.encoder.latents(list(read.values()))
                        latents |= {digest: row.clone() for digest, row in zip(read, latents_BX, strict=True)}
                    bar.update(len(part))
                self._clips.save(latents)


def _parts(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _text_key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def _half_scale(waveform_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a waveform with its peak at 1/2; silence stays silence."""
    return waveform_N * np.float32(0.5 / max(1e-8, float(np.abs(waveform_N).max(initial=0.0))))


def _cache_name(files: Mapping[str, str], parts: tuple[str, ...], *settings: object) -> str:
    """Return 16 hex digits of a digest of the files of `parts`, the model index and `settings`."""
    prefixes = (*(f"{part}/" for part in parts), "model_index.json")
    relevant = {path: sha for path, sha in files.items() if path.startswith(prefixes)}
    return hashlib.sha256(json.dumps([sorted(relevant.items()), settings]).encode()).hexdigest()[:16]
