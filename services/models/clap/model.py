"""CLAP: embed prompts and clips into one space, where cosine similarity measures how well they match.

::

    model = load_clap(mini_folder("clap-a"))
    model.score(["A dog barks"], [waveform], 16_000)        # tensor([0.61])

`ClapModel` is transformers' `ClapModel` with its preprocessing: tokenizer, resampling, windows, log-mel
spectrogram and a cache of text embeddings. `services.models.clap.loading` loads it.

Shapes: B batch, N samples, W windows (of all clips, concatenated), S samples of a window, T mel frames,
M mel bins, L text tokens, A audio tokens, D embedding width, C width of an encoder's tokens.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from services.audio.resampling import resample
from services.models.state_dicts import quiet_loading
from services.models.words import is_readable, prompt_warnings

Waveform = NDArray[np.float32]
"""Samples in [-1, 1]: [N], or [channels, N], whose channels are averaged."""

Padding = Literal["repeatpad", "repeat", "pad"]
"""How a clip shorter than a window fills it: repeated a whole number of times and then padded with silence
(as LAION does), repeated and cut, or padded with silence."""

PADDINGS: tuple[str, ...] = get_args(Padding)
"""All values of `Padding`."""

MIN_SECONDS, MAX_SECONDS = 0.1, 60.0
"""Shortest and longest clip, in seconds."""

MEL_FLOOR = 1e-10
"""Mel powers are clamped to this before the logarithm (torchlibrosa's `amin`)."""

QUANTISE = "int16_quantisation"
"""Key of preprocessor_config.json: whether samples are rounded to 16 bits first, as laion_clap does."""

CACHED_TEXTS = 4_096
"""Size of the cache of text embeddings (8 MB at 512 dimensions)."""


class PowerMel(nn.Module):
    """Windows [W, S] to log-mel power spectrograms [W, 1, T, M] in dB, T = S // hop_length + 1.

    The batched, differentiable form of `transformers.ClapFeatureExtractor`, with its filters.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, extractor: transformers.ClapFeatureExtractor) -> None:
        super().__init__()
        self.n_fft, self.hop_length = extractor.fft_window_size, extractor.hop_length
        # Fused and unfused models were trained with different filter banks.
        fused = extractor.truncation == "fusion"
        filters = extractor.mel_filters if fused else extractor.mel_filters_slaney
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    def forward(self, windows_WS: Tensor) -> Tensor:
        """Return the spectrograms [W, 1, T, M] in dB."""
        spectrum = torch.stft(
            windows_WS,
            self.n_fft,
            hop_length=self.hop_length,
            window=self.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power_WTM = spectrum.abs().square().transpose(1, 2) @ self.filters
        return 10.0 * power_WTM.clamp(min=MEL_FLOOR).log10()[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTokens:
    """The text encoder's last hidden states."""

    hidden_BLC: Tensor
    mask_BL: Tensor
    """Bool: True where there is a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioTokens:
    """The audio encoder's last hidden states, one token per step of its coarsest time grid."""

    hidden_BAC: Tensor
    """The frequency bins of a time step are concatenated in C."""
    seconds_BA: Tensor
    """Centre of each token, in seconds from the clip's start."""
    mask_BA: Tensor
    """Bool: True for tokens within the clip."""


class EmbeddingModel(Protocol):
    """The interface of every CLAP backend: `ClapModel`, and LAION's own package."""

    cache: "TextCache"

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the windows, in hertz."""

    @property
    def window_samples(self) -> int:
        """Samples S of a window."""

    @property
    def dimension(self) -> int:
        """Width D of an embedding."""

    def prepare(self, waveform: NDArray[np.float32], sampling_rate: int) -> Tensor:
        """Return the windows [W, S] of a clip."""

    def embed_windows(self, clips: Sequence[Tensor]) -> Tensor:
        """Return the embeddings [B, D] of prepared clips."""

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [B, D] of prompts."""

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`: sentences that begin with ``prompt``."""

    def reads(self, prompt: str) -> bool:
        """Return whether the model knows a word for a sound in `prompt`; else its score means nothing."""


class ClapModel(nn.Module):
    """Embeds prompts and clips, L2-normalised float32 [B, D].

    A clip longer than the model's window (10 s for LAION's models) is covered by evenly spaced windows, and
    its embedding is their normalised mean: deterministic, unlike upstream's random crop.
    """

    def __init__(
        self,
        clap: transformers.ClapModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        extractor: transformers.ClapFeatureExtractor,
        *,
        max_text_tokens: int = 77,
    ) -> None:
        """Args:
        clap: transformers' model.
        tokenizer: tokenizer of the text encoder.
        extractor: settings of the spectrogram and of the padding of short clips.
        max_text_tokens: maximum number of tokens of a prompt; the rest is truncated (LAION trained with 77).
        """
        super().__init__()
        self.clap = clap
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.mel = PowerMel(extractor)
        positions = clap.config.text_config.max_position_embeddings - clap.config.text_config.pad_token_id - 1
        self.max_text_tokens = min(max_text_tokens, positions)
        self.cache = TextCache(CACHED_TEXTS)
        self._tokenizing = threading.Lock()

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the windows, in hertz."""
        return int(self.extractor.sampling_rate)

    @property
    def window_samples(self) -> int:
        """Samples of a window, S."""
        return int(self.extractor.nb_max_samples)

    @property
    def dimension(self) -> int:
        """Width of an embedding, D."""
        return int(self.clap.config.projection_dim)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.clap.logit_scale_a.device
        return device

    @property
    def text_width(self) -> int:
        """Width C of a text token."""
        return int(self.clap.config.text_config.hidden_size)

    @property
    def audio_width(self) -> int:
        """Width C of an audio token: channels of the last stage times its frequency bins."""
        audio = self.clap.config.audio_config
        grid = audio.spec_size // self.clap.audio_model.audio_encoder.patch_stride[0]
        last = grid // 2 ** (len(audio.depths) - 1)
        bins = last // (audio.spec_size // audio.num_mel_bins)
        return int(audio.patch_embeds_hidden_size * 2 ** (len(audio.depths) - 1) * bins)

    def window_count(self, seconds: float) -> int:
        """Return the number of windows that cover a clip of `seconds`: its cost."""
        return max(1, -(-round(seconds * self.sampling_rate) // self.window_samples))

    def prepare(self, waveform: Waveform, sampling_rate: int, *, padding: Padding | None = None) -> Tensor:
        """Resample a clip and cut it into windows: float32 [W, S], on the CPU.

        Args:
            waveform: [N] or [channels, N], finite, `MIN_SECONDS` to `MAX_SECONDS` long.
            sampling_rate: sampling rate of `waveform`, in hertz.
            padding: padding of a clip shorter than a window; None: the model's own.
        """
        mono_N = waveform if waveform.ndim == 1 else waveform.mean(axis=0)
        samples_N = np.clip(resample(mono_N, sampling_rate, self.sampling_rate), -1.0, 1.0)
        if getattr(self.extractor, QUANTISE, False):
            samples_N = (samples_N * 32767.0).astype(np.int16).astype(np.float32) / np.float32(32767.0)
        size = self.window_samples
        if len(samples_N) < size:
            return torch.from_numpy(_fill(samples_N, size, padding or self.extractor.padding))[None].float()
        starts = self._starts(len(samples_N))
        return torch.from_numpy(np.stack([samples_N[start : start + size] for start in starts])).float()

    def _starts(self, count: int, windows: int | None = None) -> list[int]:
        """Return the first sample of each window of a clip of `count` samples; `windows` is their number."""
        windows = windows or max(1, -(-count // self.window_samples))
        return [round(s) for s in np.linspace(0, max(0, count - self.window_samples), windows)]

    def audio_features(self, windows_WS: Tensor) -> Tensor:
        """Return normalised embeddings [W, D] of single windows, with gradients."""
        embeddings: Tensor = self.clap.get_audio_features(**self._audio_inputs(windows_WS)).pooler_output
        return embeddings

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return normalised embeddings [B, D] of prompts, with gradients and uncached."""
        embeddings: Tensor = self.clap.get_text_features(**self._tokens(prompts)).pooler_output
        return embeddings

    @torch.inference_mode()
    def embed_windows(self, clips: Sequence[Tensor]) -> Tensor:
        """Return the embeddings [B, D] of clips prepared by `prepare`."""
        features_WD = self.audio_features(torch.cat(list(clips)).to(self.device))
        means = [part.mean(0) for part in torch.split(features_WD, [len(clip) for clip in clips])]
        return nn.functional.normalize(torch.stack(means).float(), dim=-1).cpu()

    def embed_audio(self, waveforms: Sequence[Waveform], sampling_rate: int) -> Tensor:
        """Return the embeddings [B, D] of clips with the same sampling rate in hertz."""
        return self.embed_windows([self.prepare(waveform, sampling_rate) for waveform in waveforms])

    @torch.inference_mode()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [B, D] of prompts, from the cache if possible."""
        found = self.cache.get(prompts)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            # In one pass; padding changes the embeddings by rounding only.
            # Cloned: a view in the cache would keep its whole batch in memory.
            rows = [row.clone() for row in self.text_features(missing).float().cpu()]
            embedded = dict(zip(missing, rows, strict=True))
            # What a passing fault of the device has spoilt is not kept.
            self.cache.put({prompt: row for prompt, row in embedded.items() if row.isfinite().all()})
            found |= embedded
        return torch.stack([found[prompt] for prompt in prompts])

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`: sentences that begin with ``prompt``."""
        with self._tokenizing:
            found = prompt_warnings(self.tokenizer, prompt, self.max_text_tokens)
        return tuple(f"prompt {one}" for one in found)

    def reads(self, prompt: str) -> bool:
        """Return whether the model knows a word for a sound in `prompt`; else its score means nothing."""
        with self._tokenizing:
            return is_readable(self.tokenizer, prompt)

    def score(self, prompts: Sequence[str], waveforms: Sequence[Waveform], sampling_rate: int) -> Tensor:
        """Return the CLAP scores [B]: cosine similarities of prompts and their clips, in [-1, 1]."""
        return (self.embed_text(prompts) * self.embed_audio(waveforms, sampling_rate)).sum(-1)

    @torch.inference_mode()
    def text_tokens(self, prompts: Sequence[str]) -> TextTokens:
        """Return the text encoder's tokens, before pooling."""
        tokens = self._tokens(prompts)
        hidden = self.clap.text_model(**tokens).last_hidden_state
        return TextTokens(hidden_BLC=hidden.float(), mask_BL=tokens["attention_mask"].bool())

    @torch.inference_mode()
    def audio_tokens(self, clips: Sequence[Tensor], seconds: Sequence[float]) -> AudioTokens:
        """Return the audio encoder's tokens, before pooling, with a clip's windows concatenated.

        Args:
            clips: windows of `prepare` with padding ``pad``.
            seconds: length of each clip.
        """
        windows_WS = torch.cat(list(clips)).to(self.device)
        hidden_WCFA = self.clap.audio_model(**self._audio_inputs(windows_WS)).last_hidden_state
        hidden_WAC = hidden_WCFA.permute(0, 3, 2, 1).flatten(2).float()
        steps = hidden_WAC.shape[1]
        centres_A = (torch.arange(steps) + 0.5) * (self.window_samples / self.sampling_rate / steps)
        parts = torch.split(hidden_WAC, [len(clip) for clip in clips])
        # Seconds may round to one sample, and so to one window, more than the clip has.
        starts = [
            self._starts(round(length * self.sampling_rate), len(clip))
            for clip, length in zip(clips, seconds, strict=True)
        ]
        times = [torch.cat([s / self.sampling_rate + centres_A for s in clip]) for clip in starts]
        pad = nn.utils.rnn.pad_sequence
        hidden_BAC = pad([part.flatten(0, 1) for part in parts], batch_first=True)
        seconds_BA = pad(times, batch_first=True).to(self.device)
        inside = [time < length for time, length in zip(times, seconds, strict=True)]
        # The first token's centre may lie beyond a very short clip, but there must be at least one token.
        for row in inside:
            row[0] = True
        mask_BA = pad(inside, batch_first=True).to(self.device)
        return AudioTokens(hidden_BAC=hidden_BAC, seconds_BA=seconds_BA, mask_BA=mask_BA)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder (safetensors) for `load_clap` and `transformers.AutoModel`."""
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            # Otherwise the last call's padding and truncation are saved; transformers' processor would apply
            # that truncation to audio too.
            backend.no_padding()
            backend.no_truncation()
        with quiet_loading():
            self.clap.save_pretrained(folder, safe_serialization=True)
            self.tokenizer.save_pretrained(folder)
            self.extractor.save_pretrained(folder)

    def _audio_inputs(self, windows_WS: Tensor) -> dict[str, Tensor]:
        mel_W1TM = self.mel(windows_WS)
        if not self.clap.config.audio_config.enable_fusion:
            return {"input_features": mel_W1TM}
        # A fused model has three more views, for clips longer than a window; windows never are.
        longer = torch.zeros(len(mel_W1TM), 1, dtype=torch.bool, device=mel_W1TM.device)
        return {"input_features": mel_W1TM.repeat(1, 4, 1, 1), "is_longer": longer}

    def _tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        # Truncation and padding are state of the tokenizer, which other threads must not change meanwhile.
        with self._tokenizing:
            tokens = self.tokenizer(
                list(prompts),
                padding=True,
                truncation=True,
                max_length=self.max_text_tokens,
                return_tensors="pt",
            )
        return {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}


class TextCache:
    """An LRU cache of text embeddings. Thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.hits = 0
        """Prompts that were in the cache."""
        self.misses = 0
        """Prompts that were not in the cache."""
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings [D] that are there, by prompt."""
        with self._lock:
            found = {prompt: self._kept[prompt] for prompt in prompts if prompt in self._kept}
            for prompt in found:
                self._kept.move_to_end(prompt)
            hits = sum(prompt in found for prompt in prompts)
            self.hits += hits
            self.misses += len(prompts) - hits
        return found

    def put(self, embeddings: dict[str, Tensor]) -> None:
        """Add embeddings [D] by prompt."""
        with self._lock:
            self._kept.update(embeddings)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)


def _fill(samples_N: NDArray[np.float32], size: int, padding: str) -> NDArray[np.float32]:
    """Pad or repeat a short clip to `size` samples."""
    if padding == "repeat":
        return np.tile(samples_N, size // len(samples_N) + 1)[:size]
    whole = np.tile(samples_N, size // len(samples_N)) if padding == "repeatpad" else samples_N
    return np.pad(whole, (0, size - len(whole)))
