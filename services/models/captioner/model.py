"""The captioner (SLAM-AAC, arXiv 2410.09503): a clip in, sentences out.

::

    captioner = Captioner.from_pretrained(folder)
    clip = captioner.prepare(waveform, 44_100)
    captioner.generate(captioner.encode([clip]), beams=(2, 4))   # [[Candidate(…), Candidate(…)]]

One class is served and trained. EAT encodes the log-mel spectrogram, the projector joins tokens to the width
of the language model, and that continues ``[audio tokens][prompt]`` with the caption. Training::

    captioner = Captioner.from_pretrained(folder, merge=False)
    captioner.prepare_training(LoraSettings())    # projector and LoRA are trained
    captioner(captioner.mels(clips), captions).loss.backward()
    captioner.trainable_state()

A model folder has ``config.json`` (`CaptionerConfig`), ``encoder/`` (config and safetensors),
``projector.safetensors``, ``language_model/`` (a transformers folder with its tokenizer), and ``adapter/`` (a
PEFT folder) unless the adapters are merged.

Source of the arithmetic: X-LANCE/SLAM-LLM at a68e78f, ``examples/slam_aac``.

Shapes: B clips, N samples, T mel frames, M mel bins, A audio tokens, L text tokens, D width, V vocabulary.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from services.audio.levels import has_sound
from services.audio.resampling import resample
from services.errors import ModelFormatError, invalid
from services.models.captioner.beams import Hypothesis, search
from services.models.captioner.config import (
    CONFIG_NAME,
    MAX_BEAMS,
    MAX_TOKENS,
    CaptionerConfig,
    read_captioner_config,
    write_captioner_config,
)
from services.models.captioner.eat import EatConfig, EatEncoder
from services.models.captioner.filterbank import FRAME_LENGTH, SAMPLING_RATE, FilterBank
from services.models.captioner.language import (
    attach_lora,
    cast_tensor,
    check_language_model,
    embedding_width,
    is_adapted,
    load_adapter,
    load_caption_tokenizer,
    load_language_model,
    merge_lora,
    save_adapter,
    save_language_model,
)
from services.models.folders import (
    build_dataclass,
    pick_device,
    pick_dtype,
    read_json,
    read_layout,
    safetensors_layout,
)
from services.models.lora import LoraSettings
from services.models.state_dicts import check_finite, check_layout, check_weights, on_meta

ENCODER, LANGUAGE_MODEL, ADAPTER = "encoder", "language_model", "adapter"
"""Folders in a model folder."""
ENCODER_WEIGHTS: Final = "model.safetensors"
PROJECTOR_WEIGHTS: Final = "projector.safetensors"

IGNORED_LABEL: Final = -100
"""Label of a token that has no loss."""

Waveform = NDArray[np.float32]
"""[N], or [channels, N]; in [-1, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionClip:
    """A clip prepared for the model."""

    waveform_N: Tensor
    """Mono, 16 kHz, float32 on the CPU; no longer than the model reads."""
    seconds: float
    """Length of the clip before it was cut."""
    warnings: tuple[str, ...] = ()
    """What the caption does not cover, one sentence each, which begins with ``clip``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A caption by one beam size."""

    text: str
    log_probability: float
    """Natural logarithm of the language model's probability of the caption, its end included; NaN if the
    model returned NaN for the clip."""
    beams: int
    """Beam size that found it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionOutput:
    """What a forward pass in training returns."""

    loss: Tensor
    """Mean cross-entropy over the captions' tokens and their ends, a scalar."""
    logits_BLV: Tensor
    """Of every position, the audio's included."""
    labels_BL: Tensor
    """The tokens with a loss; `IGNORED_LABEL` elsewhere."""

    @property
    def accuracy(self) -> float:
        """Return the share of tokens with a loss that are the most probable."""
        found, wanted = self.logits_BLV[:, :-1].argmax(-1), self.labels_BL[:, 1:]
        counts = wanted != IGNORED_LABEL
        return float((found == wanted)[counts].float().mean())


class Projector(nn.Module):
    """Joins groups of encoder tokens [B, L, D] to audio tokens [B, L // k, D of the language model]."""

    def __init__(self, group: int, width: int, hidden: int, output: int) -> None:
        super().__init__()
        self.group = group
        self.linear1 = nn.Linear(group * width, hidden)
        self.linear2 = nn.Linear(hidden, output)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Return the audio tokens; the last L % k tokens are dropped."""
        count = tokens_BLD.shape[1] // self.group
        grouped = tokens_BLD[:, : count * self.group].reshape(len(tokens_BLD), count, -1)
        output: Tensor = self.linear2(self.linear1(grouped).relu())
        return output


class Captioner(nn.Module):
    """Writes captions of clips; see the module's docstring."""

    def __init__(
        self,
        encoder: EatEncoder,
        projector: Projector,
        language_model: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: CaptionerConfig,
    ) -> None:
        """Args:
        encoder: the audio encoder.
        projector: fits both models, or `ModelFormatError` is raised.
        language_model: transformers' causal language model, with or without LoRA.
        tokenizer: that of the language model, with an end token.
        config: settings around the models.
        """
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.filterbank = FilterBank(encoder.config.mel_bins)
        self.encoder = encoder
        self.projector = projector
        self.language_model = language_model
        check_fit(config, encoder.config, projector.state_dict(), embedding_width(language_model))
        self._tokenizing = threading.Lock()

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of prepared clips, in hertz."""
        return SAMPLING_RATE

    @property
    def max_seconds(self) -> float:
        """Length of sound that the model reads; the rest of a longer clip is cut."""
        return self.config.max_seconds

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.encoder.class_token.device

    # ------------------------------------------------------------------------------------------ folders

    @classmethod
    def from_pretrained(
        cls, folder: Path, device: str = "cpu", dtype: str = "float32", *, merge: bool = True
    ) -> Self:
        """Load the captioner in `folder` for inference.

        Args:
            folder: model folder.
            device: torch's name of a device, or ``auto``: cuda if available, otherwise cpu.
            dtype: float type of the language model; encoder and projector compute in float32.
            merge: add the adapters to the weights of the language model, as inference needs; training does
                not.

        Raises:
            ModelNotFoundError: there is no such folder.
            ModelFormatError: the folder has another architecture, missing or damaged weights, pickles, or
                parts that do not fit each other.
            InvalidInputError: the device or float type does not exist.
        """
        target, kind = pick_device(device), pick_dtype("dtype", dtype)
        check_captioner(folder)
        config = read_captioner_config(folder)
        language_model = load_language_model(folder / LANGUAGE_MODEL, kind)
        tokenizer = load_caption_tokenizer(
            folder / LANGUAGE_MODEL, len(language_model.get_input_embeddings().weight)
        )
        if (folder / ADAPTER).is_dir():
            language_model = load_adapter(language_model, folder / ADAPTER)
            language_model = merge_lora(language_model) if merge else language_model
        encoder = EatEncoder(read_eat_config(folder / ENCODER))
        _load(encoder, folder / ENCODER / ENCODER_WEIGHTS)
        projector = make_projector(config, encoder.config, embedding_width(language_model))
        _load(projector, folder / PROJECTOR_WEIGHTS)
        captioner = cls(encoder, projector, language_model, tokenizer, config)
        return captioner.to(target).eval().requires_grad_(False)

    def save_pretrained(self, folder: Path, *, dtype: str | None = None) -> None:
        """Write a model folder (safetensors), without a manifest.

        `dtype` is the float type of all files; None: that of each parameter.
        """
        kind = None if dtype is None else pick_dtype("dtype", dtype)
        for part in (folder, folder / ENCODER):
            part.mkdir(parents=True, exist_ok=True)
        write_captioner_config(self.config, folder)
        _write_eat_config(self.encoder.config, folder / ENCODER)
        _save(self.encoder, folder / ENCODER / ENCODER_WEIGHTS, kind)
        _save(self.projector, folder / PROJECTOR_WEIGHTS, kind)
        model = self.language_model
        if is_adapted(model):
            save_adapter(model, folder / ADAPTER, kind)
        save_language_model(model, self.tokenizer, folder / LANGUAGE_MODEL, kind)

    # -------------------------------------------------------------------------------------------- audio

    def prepare(self, waveform: Waveform, sampling_rate: int) -> CaptionClip:
        """Average a clip's channels, resample it and cut what the model does not read. Thread-safe.

        Args:
            waveform: [N] or [channels, N].
            sampling_rate: that of `waveform`, in hertz.

        Raises:
            InvalidInputError: for ``audio``: it has NaN or infinity, or is shorter than a frame (25 ms).
        """
        if not np.isfinite(waveform).all():
            raise invalid("audio", "holds NaN or infinity; send finite samples in [-1, 1]")
        mono_N = waveform if waveform.ndim == 1 else waveform.mean(axis=0)
        seconds = len(mono_N) / sampling_rate
        samples_N = resample(np.asarray(mono_N, dtype=np.float32), sampling_rate, SAMPLING_RATE)
        if len(samples_N) < FRAME_LENGTH:
            raise invalid(
                "audio", f"is {seconds:.3g} s long; send at least {FRAME_LENGTH / SAMPLING_RATE:g} s"
            )
        warnings = []
        if not has_sound(samples_N):
            warnings.append("clip is silent; its caption says nothing")
        if seconds > self.max_seconds:
            warnings.append(
                f"clip is {seconds:.2f} s long and the model reads its first {self.max_seconds:g} s; caption "
                "parts of it"
            )
        # The mean is removed before the cut.
        samples_N = samples_N - samples_N.mean(dtype=np.float64).astype(np.float32)
        last = (self.config.frames - 1) * 160 + FRAME_LENGTH
        return CaptionClip(
            waveform_N=torch.from_numpy(samples_N[:last].copy()), seconds=seconds, warnings=tuple(warnings)
        )

    def mel(self, clip: CaptionClip) -> Tensor:
        """Return a clip's normalised log-mel spectrogram [T, M], on the model's device."""
        return fit_frames(self.filterbank(clip.waveform_N.to(self.device)), self.config)

    def mels(self, clips: Sequence[CaptionClip]) -> Tensor:
        """Return the normalised log-mel spectrograms [B, T, M]; padding comes before normalisation."""
        return torch.stack([self.mel(clip) for clip in clips])

    def encode_mels(self, mels_BTM: Tensor) -> Tensor:
        """Return audio tokens [B, A, D] of normalised spectrograms, with gradients if they are enabled."""
        tokens_BAD: Tensor = self.projector(self.encoder(mels_BTM))
        return tokens_BAD

    @torch.inference_mode()
    def encode(self, clips: Sequence[CaptionClip]) -> Tensor:
        """Return the audio tokens [B, A, D] of clips, which `generate` continues."""
        return self.encode_mels(self.mels(clips))

    # --------------------------------------------------------------------------------------- generation

    @torch.inference_mode()
    def generate(
        self,
        audio_BAD: Tensor,
        beams: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[list[Candidate]]:
        """Return for each clip the best caption of each beam size.

        All clips and beam sizes are searched in one batch; the result is that of one by one, up to rounding.

        Args:
            audio_BAD: audio tokens of `encode`.
            beams: beam sizes from 1 to `MAX_BEAMS`; None: the model's own.
            max_new_tokens: most tokens of a caption, to `MAX_TOKENS`; None: the model's own.

        Raises:
            InvalidInputError: a beam size or `max_new_tokens` is out of range.
        """
        beams = self.config.beams if beams is None else tuple(beams)
        tokens = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not beams or not all(1 <= size <= MAX_BEAMS for size in beams):
            raise invalid("beams", f"is {list(beams)}; give sizes from 1 to {MAX_BEAMS}, at least one")
        if not 1 <= tokens <= MAX_TOKENS:
            raise invalid("max_new_tokens", f"is {tokens}; it must be from 1 to {MAX_TOKENS}")
        if not len(audio_BAD):
            return []
        found = search(
            self.language_model,
            self.prompts(audio_BAD),
            beams,
            end=self.tokenizer.eos_token_id,
            max_new_tokens=tokens,
        )
        return [[self._candidate(one, size) for one, size in zip(row, beams, strict=True)] for row in found]

    def prompts(self, audio_BAD: Tensor) -> Tensor:
        """Return the embeddings [B, A + L, D] that the language model continues: audio, then the prompt."""
        prompt_LD = self._embed(torch.tensor(self.prompt_ids(), device=self.device))
        return torch.cat([audio_BAD.to(prompt_LD.dtype), prompt_LD.expand(len(audio_BAD), -1, -1)], dim=1)

    def _candidate(self, found: Hypothesis, size: int) -> Candidate:
        with self._tokenizing:
            text = self.tokenizer.decode(list(found.tokens), skip_special_tokens=True)
        return Candidate(text=str(text).strip(), log_probability=found.log_probability, beams=size)

    # ----------------------------------------------------------------------------------------- training

    def prepare_training(self, lora: LoraSettings | None = None, *, everything: bool = False) -> None:
        """Choose the parameters that are trained: the projector, and LoRA if its settings are given.

        Adapters that were loaded are kept, whatever `lora` says. `everything` trains the encoder and the
        language model too, without LoRA: for small models from scratch.
        """
        self.requires_grad_(everything)
        if lora is not None and not is_adapted(self.language_model):
            self.language_model = attach_lora(self.language_model, lora).train(self.training)
        for name, parameter in self.named_parameters():
            if name.startswith("projector.") or ".lora_" in name:
                parameter.requires_grad_(True)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return copies of the parameters that are trained, on the CPU, by name."""
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `trainable_state` returned. Raises `ModelFormatError` unless it has the same keys."""
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        check_layout("trainable state", own, state)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def prompt_ids(self) -> list[int]:
        """Return the tokens of the prompt alone, with the tokenizer's own beginning."""
        return self._tokenize(self.config.prompt)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, labels and mask [B, L] of prompts with captions, padded on the right, on the CPU.

        Prompt and caption are tokenised together, as upstream does. The labels of as many tokens as the
        prompt alone has are `IGNORED_LABEL`; mask is False for padding.
        """
        boundary = len(self.prompt_ids())
        end = self.tokenizer.eos_token_id
        rows = [torch.tensor([*self._tokenize(self.config.prompt + text), end]) for text in captions]
        ids_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        places_L = torch.arange(ids_BL.shape[1])
        mask_BL = places_L < torch.tensor([len(row) for row in rows])[:, None]
        labels_BL = ids_BL.masked_fill(~mask_BL | (places_L < boundary), IGNORED_LABEL)
        return ids_BL, labels_BL, mask_BL

    def layout(self, audio_BAD: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings [B, A + L, D], labels and mask [B, A + L] of audio, prompts and captions."""
        ids_BL, labels_BL, mask_BL = (one.to(self.device) for one in self.tokenize(captions))
        text_BLD = self._embed(ids_BL)
        batch, count = audio_BAD.shape[:2]
        embeddings = torch.cat([audio_BAD.to(text_BLD.dtype), text_BLD], dim=1)
        no_labels = labels_BL.new_full((batch, count), IGNORED_LABEL)
        audible = mask_BL.new_ones((batch, count))
        return embeddings, torch.cat([no_labels, labels_BL], 1), torch.cat([audible, mask_BL], 1)

    def forward(self, mels_BTM: Tensor, captions: Sequence[str]) -> CaptionOutput:
        """Return the loss of captions of normalised spectrograms; gradients reach what is trained."""
        embeddings, labels, mask = self.layout(self.encode_mels(mels_BTM), captions)
        output = self.language_model(inputs_embeds=embeddings, attention_mask=mask.long(), labels=labels)
        return CaptionOutput(loss=output.loss, logits_BLV=output.logits, labels_BL=labels)

    def loss(self, mels_BTM: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the loss of `forward`."""
        return self(mels_BTM, captions).loss  # type: ignore[no-any-return]

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.language_model.get_input_embeddings()(ids)
        return embedded

    def _tokenize(self, text: str) -> list[int]:
        with self._tokenizing:
            ids = [int(one) for one in self.tokenizer(text)["input_ids"]]
        # Some tokenizers add the end; it has its own place.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


def fit_frames(mel_TM: Tensor, config: CaptionerConfig, *, fixed: bool = True) -> Tensor:
    """Pad with zeros or cut a spectrogram, then normalise it: upstream's order, after which padding is 0.467.

    `fixed` fits it to the model's number of frames, otherwise it is padded to a multiple of 16.
    """
    frames = config.frames if fixed else -(-len(mel_TM) // 16) * 16
    fitted_TM = nn.functional.pad(mel_TM[:frames], (0, 0, 0, max(0, frames - len(mel_TM))))
    return (fitted_TM - config.mel_mean) / (2 * config.mel_deviation)


# ---------------------------------------------------------------------------------------------- folders


def check_captioner(folder: Path) -> None:
    """Raise `ModelNotFoundError` or `ModelFormatError` unless `folder` has a complete captioner whose parts
    fit each other. Loads no weights.
    """
    config = read_captioner_config(folder)
    encoder = read_eat_config(folder / ENCODER)
    check_weights(str(folder / ENCODER), on_meta(lambda: EatEncoder(encoder)), read_layout(folder / ENCODER))
    width = check_language_model(folder / LANGUAGE_MODEL)
    layout = safetensors_layout(folder / PROJECTOR_WEIGHTS)
    check_fit(config, encoder, layout, width)
    check_weights(
        str(folder / PROJECTOR_WEIGHTS), on_meta(lambda: make_projector(config, encoder, width)), layout
    )


def check_fit(
    config: CaptionerConfig, encoder: EatConfig, projector: Mapping[str, Tensor], width: int
) -> None:
    """Raise `ModelFormatError` with both numbers unless the parts fit each other.

    Args:
        config: has the group k and the frames.
        encoder: config of the encoder.
        projector: the projector's weights; may be on the meta device.
        width: width of the language model's embeddings.
    """
    sizes = {key: weight.shape for key, weight in projector.items() if weight.ndim == 2}
    takes, gives = sizes.get("linear1.weight", (0, 0))[1], sizes.get("linear2.weight", (0, 0))[0]
    joined = config.group * encoder.width
    if takes and takes != joined:
        raise ModelFormatError(
            f"the projector takes {takes} features, but {config.group} encoder tokens of width "
            f"{encoder.width} have {joined}; it was trained with another encoder"
        )
    if gives and gives != width:
        raise ModelFormatError(
            f"the projector gives audio tokens of width {gives}, but the language model's have {width}; it "
            "was trained with another language model"
        )
    if config.frames > encoder.max_frames:
        raise ModelFormatError(
            f"the captioner reads {config.frames} frames, but the encoder takes {encoder.max_frames} at most"
        )


def make_projector(config: CaptionerConfig, encoder: EatConfig, width: int) -> Projector:
    """Return a new projector from the encoder to a language model of `width`."""
    return Projector(config.group, encoder.width, config.projector_width, width)


def read_eat_config(folder: Path) -> EatConfig:
    """Return the encoder's config in `folder`. Raises `ModelFormatError`."""
    path = folder / CONFIG_NAME
    return build_dataclass(EatConfig, read_json(path), path)


def _write_eat_config(config: EatConfig, folder: Path) -> None:
    text = json.dumps(asdict(config), indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _load(part: nn.Module, path: Path) -> None:
    weights = load_file(path)
    check_finite(str(path), weights)
    part.load_state_dict({key: value.float() for key, value in weights.items()})


def _save(part: nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    weights = {key: cast_tensor(value, dtype) for key, value in part.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})
