"""`TangoFluxPipeline`: prompt to waveform, with the parts of TangoFlux (arXiv 2412.21037).

Sizes, defaults and arithmetic are upstream's (declare-lab/TangoFlux, ``model.py``), unless a docstring says
otherwise. Not verified with the released weights, which can't be converted yet.

Shapes: B batch, T latent frames, C latent channels, N samples, M mel bins.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from diffusers import AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from services.api.generation import Defaults, GenerationModel, Limits, ModelGeometry
from services.api.model import UNVERSIONED
from services.errors import ModelFormatError, invalid
from services.models.audio_pipeline import AudioPipeline
from services.models.latent import Conditioning, Solver, within_full_scale
from services.models.mel import LogMel, mel_frames
from services.models.pipelines import Architecture
from services.models.profiles import with_profiles
from services.models.tangoflux.denoiser import TangoFluxDenoiser, flow_velocity

SCHEDULERS: Final = ("euler",)
"""Names of the schedulers."""

PREVIEW_MEL_BINS: Final = 64
"""Mel bins of previews; the model itself uses no spectrogram."""


class FlowSolver(Solver):
    """Steps along a rectified flow."""

    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return ``x - s v``: the end of the straight path through x."""
        return latents - float(self._scheduler.sigmas[index]) * output


class TangoFluxPipeline(AudioPipeline):
    """Text to audio by flow matching; inference only. A `LatentPipeline`.

    Parts: a T5 encoder reads the prompt, a transformer moves latents [B, T, C] from noise to the clip, an
    autoencoder turns them into a waveform. Latents always have `latent_length` frames, and a shorter clip is
    their beginning; the denoiser is conditioned on its duration. Channels are averaged: clips are mono.

    Raises `ModelFormatError` if the parts do not fit together.
    """

    predictions = (None, "flow_prediction")
    training_scheduler = "FlowMatchEulerDiscreteScheduler"
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    transformer: TangoFluxDenoiser
    vae: AutoencoderOobleck
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        transformer: TangoFluxDenoiser,
        vae: AutoencoderOobleck,
        scheduler: FlowMatchEulerDiscreteScheduler,
        default_duration: float = 10.0,
        max_duration: float = 29.95,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 4.5,
        default_scheduler: str = "euler",
        latent_length: int = 645,
        text_length: int | None = 64,
        profiles: dict[str, Any] | None = None,
    ) -> None:
        """Durations in seconds; `text_length` in tokens, `latent_length` in latent frames.

        `profiles` are named settings (`services.models.profiles`).
        """
        super().__init__()
        parts = {"text_encoder": text_encoder, "transformer": transformer, "vae": vae}
        self.register_modules(tokenizer=tokenizer, scheduler=scheduler, **parts)
        self.register_to_config(
            default_duration=default_duration,
            max_duration=max_duration,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_scheduler=default_scheduler,
            latent_length=latent_length,
            text_length=text_length,
            profiles=profiles,
        )
        _check_parts(self)
        for part in parts.values():
            part.eval().requires_grad_(False)

    @property
    def description(self) -> GenerationModel:
        """See `LatentPipeline`."""
        config, rate, hop = self.config, self.vae.config.sampling_rate, self.vae.hop_length
        model = GenerationModel(
            model=UNVERSIONED,
            geometry=ModelGeometry(
                sampling_rate=rate,
                hop_length=hop,
                mel_bins=PREVIEW_MEL_BINS,
                latent_channels=self.vae.config.decoder_input_channels,
                latent_downsampling=1,
                duration_grid=config.latent_length * hop / rate,
            ),
            limits=Limits(
                min_duration=hop / rate,
                max_duration=config.max_duration,
                max_steps=self.scheduler.config.num_train_timesteps,
                schedulers=SCHEDULERS,
            ),
            defaults=Defaults(
                duration=config.default_duration,
                num_inference_steps=config.default_num_inference_steps,
                guidance_scale=config.default_guidance_scale,
                scheduler=config.default_scheduler,
                sampling_rate=rate,
            ),
        )
        return with_profiles(model, config.profiles)

    @property
    def adaptable(self) -> nn.Module:
        """See `LatentPipeline`."""
        return self.transformer

    def latent_frames(self, duration: float) -> int:
        """See `LatentPipeline`: the same for every duration."""
        return int(self.config.latent_length)

    def latent_samples(self, duration: float) -> int:
        """See `LatentPipeline`."""
        samples: int = round(duration * self.vae.config.sampling_rate)
        return samples

    def latent_shape(self, duration: float) -> tuple[int, int]:
        """Return the shape (T, C) of the latents, the same for every duration."""
        return self.config.latent_length, self.vae.config.decoder_input_channels

    def noise(self, duration: float, generator: Generator) -> Tensor:
        """See `LatentPipeline`."""
        return self.prepare_latents(1, duration, generator)

    def make_scheduler(self, name: str | None = None) -> FlowMatchEulerDiscreteScheduler:
        """Return a new scheduler by name (None: the model's default)."""
        name = name or self.config.default_scheduler
        if name not in SCHEDULERS:
            raise invalid("scheduler", f"unknown scheduler {name!r}; use one of {', '.join(SCHEDULERS)}")
        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)

    def set_timesteps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        """Set even steps, from noise to one step before the clip, if `scheduler` takes any."""
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
        else:
            scheduler.set_timesteps(steps, device=device)

    def solver(self, name: str, steps: int) -> Solver:
        """See `LatentPipeline`."""
        scheduler = self.make_scheduler(name)
        self.set_timesteps(scheduler, steps)
        return FlowSolver(scheduler)

    @torch.no_grad()
    def predict(
        self,
        latents_BTC: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor,
        jumps_B2: Tensor | None = None,
    ) -> Tensor:
        """See `LatentPipeline`: the velocity, noise minus clip."""
        device, dtype = self.transformer.device, self.transformer.dtype
        velocity_BTC = flow_velocity(
            self.transformer,
            latents_BTC.to(device, dtype),
            timesteps_B.to(device),
            conditioning.to(device, dtype),
            seconds_B.to(device),
        )
        return velocity_BTC.float()

    @torch.no_grad()
    def decode(self, latents_BTC: Tensor, samples: int | None = None) -> Tensor:
        """See `LatentPipeline`."""
        z_BCT = latents_BTC.to(self.device_of(self.vae), self.vae.dtype).transpose(1, 2)
        waveform_BN = self.vae.decode(z_BCT, return_dict=False)[0].float().mean(1)
        return within_full_scale(waveform_BN[:, :samples])

    def preview(self, latents_BTC: Tensor, samples: int) -> Tensor:
        """See `LatentPipeline`: the spectrogram of the decoded waveform, a frame a latent frame."""
        waveform_BN = self.decode(latents_BTC)
        hop = self.vae.hop_length
        log_mel = LogMel(
            sampling_rate=self.vae.config.sampling_rate,
            n_fft=max(1024, 2 * hop),
            hop_length=hop,
            mel_bins=PREVIEW_MEL_BINS,
        )
        mel_B1TM = mel_frames(waveform_BN, log_mel.to(waveform_BN.device))
        return mel_B1TM[:, 0, : -(-samples // hop)]

    @torch.no_grad()
    def encode_audio(self, waveform_BN: Tensor, *, sample: bool = False) -> Tensor:
        """See `LatentPipeline`: the latents of the clip and of silence after it."""
        missing = self.config.latent_length * self.vae.hop_length - waveform_BN.shape[1]
        padded_BN = torch.nn.functional.pad(waveform_BN, (0, missing))
        stereo_BCN = padded_BN[:, None].expand(-1, self.vae.config.audio_channels, -1)
        posterior = self.vae.encode(stereo_BCN).latent_dist
        return cast(Tensor, (posterior.sample() if sample else posterior.mean).transpose(1, 2))


def _check_parts(pipeline: TangoFluxPipeline) -> None:
    """Raise `ModelFormatError` if one part's output is not the next part's input."""
    transformer, vae, config = pipeline.transformer.config, pipeline.vae.config, pipeline.config
    pairs: Sequence[tuple[str, Any, str, Any]] = (
        ("transformer.joint_attention_dim", transformer.joint_attention_dim, "text_encoder.d_model",
         pipeline.text_encoder.config.d_model),
        ("transformer.in_channels", transformer.in_channels, "vae.decoder_input_channels",
         vae.decoder_input_channels),
    )  # fmt: skip
    wrong = [f"{a} is {x} but {b} is {y}" for a, x, b, y in pairs if x != y]
    longest = config.latent_length * pipeline.vae.hop_length / vae.sampling_rate
    if not 0 < config.default_duration <= config.max_duration <= longest:
        wrong.append(
            f"default_duration {config.default_duration} s and max_duration {config.max_duration} s do not "
            f"ascend to at most {longest:g} s, which latent_length {config.latent_length} holds"
        )
    if wrong:
        raise ModelFormatError("the parts do not fit together: " + "; ".join(wrong))


TANGOFLUX: Final = Architecture(
    pipeline=TangoFluxPipeline,
    parts={
        "text_encoder": {"transformers.T5EncoderModel": lambda config: T5EncoderModel(T5Config(**config))},
        "transformer": {f"{TangoFluxDenoiser.__module__}.TangoFluxDenoiser": TangoFluxDenoiser.from_config},
        "vae": {"diffusers.AutoencoderOobleck": AutoencoderOobleck.from_config},
    },
    schedulers=("diffusers.FlowMatchEulerDiscreteScheduler",),
    denoiser="transformer",
    denoiser_class=TangoFluxDenoiser,
    denoise=flow_velocity,
    objective="flow",
    encoders=("vae",),
    decoders=("vae",),
    tags=("flow-matching", "tangoflux"),
)
