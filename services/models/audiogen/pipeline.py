"""`AudioGenPipeline`: prompt to waveform by a language model of audio tokens.

Sizes and arithmetic are upstream's (facebookresearch/audiocraft, ``models/lm.py``,
``modules/conditioners.py``). To the engine it is a `LatentPipeline` whose denoiser predicts the next step's
logits: one call, one step of the token sequence of each clip of the batch, at whatever step each of them is.

Shapes: B clips, K codebooks, S steps, T frames, V codes, L text tokens, D text width, N samples, M mel bins.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Generator, Tensor
from transformers import (
    EncodecConfig,
    EncodecModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from services.api.generation import Defaults, GenerationModel, Limits, ModelGeometry
from services.api.model import UNVERSIONED
from services.errors import ModelFormatError, invalid
from services.models.audio_pipeline import AudioPipeline, Generators
from services.models.audiogen.codec import QuantisedAutoencoder
from services.models.audiogen.language_model import PrefixCache, TextProjection, heads
from services.models.audiogen.pattern import delayed, steps_of, undelayed
from services.models.audiogen.sampling import GREEDY, SAMPLE, SCHEDULERS, TokenScheduler, TokenSolver
from services.models.latent import Conditioning, Solver, within_full_scale
from services.models.mel import LogMel, mel_frames
from services.models.pipelines import Architecture

PREVIEW_MEL_BINS: Final = 64
"""Mel bins of previews; the model itself uses no spectrogram."""


class AudioGenPipeline(AudioPipeline):
    """Text to audio by a language model; inference only. A `LatentPipeline`.

    Parts: a T5 encoder reads the prompt, a projection takes its tokens to the width of the language model
    (the decoder), which continues K codebooks in a delay pattern, and a codec decodes them. The "latents"
    are the token sequence [B, K, S] as float32.

    Raises `ModelFormatError` if the parts do not fit together.
    """

    predictions = (None,)
    training_scheduler = "TokenScheduler"
    model_cpu_offload_seq = "text_encoder->projection->decoder->codec"

    decoder: MusicgenForCausalLM
    projection: TextProjection
    codec: EncodecModel | QuantisedAutoencoder
    scheduler: TokenScheduler

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        projection: TextProjection,
        decoder: MusicgenForCausalLM,
        codec: EncodecModel | QuantisedAutoencoder,
        scheduler: TokenScheduler,
        default_duration: float = 5.0,
        max_duration: float = 10.0,
        default_guidance_scale: float = 3.0,
        text_length: int | None = None,
    ) -> None:
        """Durations in seconds; `text_length` is the padded length of prompts (None: no padding)."""
        super().__init__()
        parts = {"text_encoder": text_encoder, "projection": projection, "decoder": decoder, "codec": codec}
        self.register_modules(tokenizer=tokenizer, scheduler=scheduler, **parts)
        self.register_to_config(
            default_duration=default_duration,
            max_duration=max_duration,
            default_guidance_scale=default_guidance_scale,
            text_length=text_length,
        )
        _check_parts(self)
        self._prefixes = PrefixCache(decoder)
        for part in parts.values():
            part.eval().requires_grad_(False)

    # ----------------------------------------------------------------------------------------------- sizes

    @property
    def codebooks(self) -> int:
        """Number of codebooks, K."""
        return int(self.decoder.config.num_codebooks)

    @property
    def special(self) -> int:
        """The token that fills the corners of the delay pattern."""
        return int(self.decoder.config.vocab_size)

    @property
    def hop_length(self) -> int:
        """Samples of a frame of tokens."""
        return int(self.codec.config.hop_length)

    @property
    def description(self) -> GenerationModel:
        """See `LatentPipeline`."""
        config, rate, hop = self.config, int(self.codec.config.sampling_rate), self.hop_length
        return GenerationModel(
            model=UNVERSIONED,
            geometry=ModelGeometry(
                sampling_rate=rate,
                hop_length=hop,
                mel_bins=PREVIEW_MEL_BINS,
                latent_channels=self.codebooks,
                latent_downsampling=1,
                duration_grid=hop / rate,
            ),
            limits=Limits(min_duration=hop / rate, max_duration=config.max_duration, schedulers=SCHEDULERS),
            defaults=Defaults(
                duration=config.default_duration,
                num_inference_steps=self.steps(1, config.default_duration),
                guidance_scale=config.default_guidance_scale,
                scheduler=SAMPLE,
                sampling_rate=rate,
            ),
        )

    def steps(self, asked: int, duration: float) -> int:
        """See `LatentPipeline`: the steps of the sequence but the first, whatever is asked for."""
        return self.latent_frames(duration) - 1

    def latent_frames(self, duration: float) -> int:
        """See `LatentPipeline`: the steps S of the token sequence."""
        samples = round(duration * self.codec.config.sampling_rate)
        return steps_of(-(-samples // self.hop_length), self.codebooks)

    def latent_samples(self, duration: float) -> int:
        """See `LatentPipeline`."""
        return (self.latent_frames(duration) - self.codebooks) * self.hop_length

    def latent_shape(self, duration: float) -> tuple[int, int]:
        """Return the shape (K, S) of the token sequence of a clip of `duration` seconds."""
        return self.codebooks, self.latent_frames(duration)

    # ------------------------------------------------------------------------------------------------ text

    def text_length(self, prompt: str) -> int:
        """See `LatentPipeline`. Padding changes a clip, so a prompt is not padded unless all of them are."""
        return int(self.config.text_length or min(self.token_count(prompt), self.max_prompt_tokens))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, length: int | None = None) -> Conditioning:
        """Encode `prompts`: padded rows, and all rows of an empty prompt, are zero: the null condition."""
        encoded = super().encode(prompts, length=length)
        given_B = torch.tensor([bool(prompt) for prompt in prompts], device=encoded["mask"].device)
        return encoded.embedded(encoded["embeds"] * (encoded["mask"] & given_B[:, None])[..., None])

    # -------------------------------------------------------------------------------------------- generation

    def prepare_latents(self, count: int, duration: float, generator: Generators = None) -> Tensor:
        """Return sequences [count, K, S] of special tokens; nothing is drawn before the first step."""
        return torch.full((count, *self.latent_shape(duration)), float(self.special), device=self.device)

    def noise(self, duration: float, generator: Generator) -> Tensor:
        """See `LatentPipeline`: a sequence without codes yet."""
        return self.prepare_latents(1, duration)

    def make_scheduler(self, name: str | None = None) -> TokenScheduler:
        """Return a new scheduler by name (None: sampling)."""
        if name not in (None, *SCHEDULERS):
            raise invalid("scheduler", f"unknown scheduler {name!r}; use one of {', '.join(SCHEDULERS)}")
        config = {**self.scheduler.config, **({"top_k": 1} if name == GREEDY else {})}
        return cast(TokenScheduler, TokenScheduler.from_config(config))

    def solver(self, name: str, steps: int) -> Solver:
        """See `LatentPipeline`."""
        scheduler = self.make_scheduler(name)
        self.set_timesteps(scheduler, steps)
        return TokenSolver(scheduler)

    @torch.no_grad()
    def predict(
        self,
        latents_BKS: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor | None = None,
        jumps_B2: Tensor | None = None,
    ) -> Tensor:
        """See `LatentPipeline`: the logits [B, K, V] after step `timesteps_B` of each sequence."""
        device, dtype = self.decoder.device, self.decoder.dtype
        steps_B = timesteps_B.to(device).long()
        text_BLW = self.projection(conditioning.to(device, dtype)["embeds"])
        sequence_BKS = latents_BKS.to(device).long()[..., : int(steps_B.max()) + 1]
        states_BSW = self._prefixes.states(sequence_BKS, text_BLW)
        last_B1W = states_BSW[torch.arange(len(steps_B), device=device), steps_B][:, None]
        return heads(self.decoder, last_B1W)[:, :, 0].float()

    @torch.no_grad()
    def decode(self, latents_BKS: Tensor, samples: int | None = None) -> Tensor:
        """See `LatentPipeline`."""
        codes_BKT = undelayed(latents_BKS.to(self.device_of(self.codec)).long())
        # Places that hold no code yet, in a preview, take the first one.
        codes_BKT = codes_BKT.where(codes_BKT < self.special, 0)
        waveform_B1N = self.codec.decode(codes_BKT[None], [None]).audio_values
        return within_full_scale(waveform_B1N[:, 0, :samples].float())

    def preview(self, latents_BKS: Tensor, samples: int) -> Tensor:
        """See `LatentPipeline`: the spectrogram of the decoded tokens, a frame a frame of tokens."""
        waveform_BN = self.decode(latents_BKS)
        log_mel = LogMel(
            sampling_rate=self.codec.config.sampling_rate,
            n_fft=max(1024, 2 * self.hop_length),
            hop_length=self.hop_length,
            mel_bins=PREVIEW_MEL_BINS,
        )
        mel_B1TM = mel_frames(waveform_BN, log_mel.to(waveform_BN.device))
        return mel_B1TM[:, 0, : -(-samples // self.hop_length)]

    @torch.no_grad()
    def encode_audio(self, waveform_BN: Tensor, *, sample: bool = False) -> Tensor:
        """See `LatentPipeline`: the token sequences [B, K, S]; nothing is drawn."""
        device = self.device_of(self.codec)
        codes_BKT = self.codec.encode(waveform_BN[:, None].to(device)).audio_codes[0]
        return delayed(codes_BKT, self.special).float()


def _check_parts(pipeline: AudioGenPipeline) -> None:
    """Raise `ModelFormatError` if one part's output is not the next part's input."""
    decoder, projection, codec = pipeline.decoder.config, pipeline.projection.config, pipeline.codec.config
    pairs: Sequence[tuple[str, Any, str, Any]] = (
        ("projection.text_width", projection.text_width, "text_encoder.d_model",
         pipeline.text_encoder.config.d_model),
        ("projection.width", projection.width, "decoder.hidden_size", decoder.hidden_size),
        ("decoder.num_codebooks", decoder.num_codebooks, "codec.num_quantizers", codec.num_quantizers),
        ("decoder.vocab_size", decoder.vocab_size, "codec.codebook_size", codec.codebook_size),
        ("decoder.audio_channels", decoder.audio_channels, "1 (mono)", 1),
        ("scheduler.special", pipeline.scheduler.config.get("special", decoder.vocab_size),
         "decoder.vocab_size", decoder.vocab_size),
    )  # fmt: skip
    wrong = [f"{a} is {x} but {b} is {y}" for a, x, b, y in pairs if x != y]
    if not 0 < pipeline.config.default_duration <= pipeline.config.max_duration:
        wrong.append("default_duration and max_duration do not ascend")
    if wrong:
        raise ModelFormatError("the parts do not fit together: " + "; ".join(wrong))


AUDIOGEN: Final = Architecture(
    pipeline=AudioGenPipeline,
    parts={
        "text_encoder": {"transformers.T5EncoderModel": lambda config: T5EncoderModel(T5Config(**config))},
        "projection": {f"{TextProjection.__module__}.TextProjection": TextProjection.from_config},
        "decoder": {
            "transformers.MusicgenForCausalLM": lambda config: MusicgenForCausalLM(
                MusicgenDecoderConfig(**config)
            )
        },
        "codec": {
            "transformers.EncodecModel": lambda config: EncodecModel(EncodecConfig(**config)),
            f"{QuantisedAutoencoder.__module__}.QuantisedAutoencoder": QuantisedAutoencoder.from_config,
        },
    },
    schedulers=(f"{TokenScheduler.__module__}.TokenScheduler",),
    denoiser="decoder",
    denoiser_class=MusicgenForCausalLM,
    denoise=None,
    objective=None,
    encoders=("codec",),
    decoders=("codec",),
    tags=("audiogen", "autoregressive"),
)
