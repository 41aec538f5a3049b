"""`TangoPipeline`: prompt to waveform, with the parts of Tango 2 (arXiv 2404.09956).

Shapes: B batch, C channels, T latent frames (time), F latent mel bins, L text tokens, D text width,
N samples, M mel bins.
"""

import math
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SpeechT5HifiGan

from services.api.generation import Defaults, GenerationModel, Limits, ModelGeometry
from services.api.model import UNVERSIONED
from services.errors import ModelFormatError
from services.models.audio_pipeline import AudioPipeline
from services.models.latent import Conditioning, Solver, within_full_scale
from services.models.mel import LogMel, mel_frames
from services.models.profiles import with_profiles
from services.models.tango.distilled import (
    DISTILLED_SCHEDULERS,
    STARTS,
    JumpScheduler,
    JumpSolver,
    is_distilled,
    jump_embedding,
    jump_scheduler,
)
from services.models.tango.geometry import Geometry
from services.models.tango.schedulers import SCHEDULERS, VelocitySolver, make_scheduler
from services.models.vocoder import GriffinLimVocoder


def velocity(
    unet: nn.Module,
    latents_BCTF: Tensor,
    timesteps_B: Tensor,
    conditioning: Conditioning,
    seconds_B: Tensor | None = None,
    jumps_B2: Tensor | None = None,
) -> Tensor:
    """Call the denoiser: v [B, C, T, F] (arXiv 2202.00512). Tango is not conditioned on the duration.

    `jumps_B2` are of distilled denoisers: guidance scales, and timesteps that the step leads to.

    The text mask is mandatory: without it the padding changes the prediction by half of its size.
    """
    v_BCTF = unet(
        latents_BCTF,
        timesteps_B,
        encoder_hidden_states=conditioning["embeds"],
        encoder_attention_mask=conditioning["mask"],
        timestep_cond=None if jumps_B2 is None else jump_embedding(jumps_B2).to(latents_BCTF.dtype),
        return_dict=False,
    )[0]
    return cast(Tensor, v_BCTF)


class TangoPipeline(AudioPipeline):
    """Text to audio by latent diffusion; inference only.

    Parts: a text encoder (T5, or another with token states) reads the prompt, a UNet denoises latents
    [B, C, T, F] by v-prediction, a variational autoencoder turns them into a log-mel spectrogram, a vocoder
    turns that into a waveform. `encode`, `predict`, `denoise` and `decode` can be used apart. The order of
    guidance's halves, the mandatory text mask and the padded empty prompt as the unconditional text are
    upstream's (`models.py`, `inference` and `encode_text_classifier_free`).

    Raises `ModelFormatError` where the parts do not fit together.
    """

    predictions = ("v_prediction",)
    training_scheduler = "DDPMScheduler"
    model_cpu_offload_seq = "text_encoder->unet->vae->vocoder"

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    vocoder: SpeechT5HifiGan | GriffinLimVocoder
    scheduler: SchedulerMixin

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        vocoder: SpeechT5HifiGan | GriffinLimVocoder,
        scheduler: SchedulerMixin,
        default_duration: float = 10.24,
        max_duration: float = 10.24,
        default_num_inference_steps: int = 100,
        default_guidance_scale: float = 3.0,
        default_scheduler: str = "ddpm",
        sampling_rate: int = 16_000,
        hop_length: int = 160,
        mel_bins: int = 64,
        text_length: int | None = None,
        maximum_hertz: float | None = None,
        profiles: dict[str, Any] | None = None,
    ) -> None:
        """Durations in seconds; `text_length` fixes the padded prompt length (None: as long as needed).

        `maximum_hertz` is the upper edge of the spectrogram (None: half the sampling rate). `profiles` are
        named settings (`services.models.profiles`).
        """
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            vae=vae,
            vocoder=vocoder,
            scheduler=scheduler,
        )
        self.register_to_config(
            default_duration=default_duration,
            max_duration=max_duration,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_scheduler=default_scheduler,
            sampling_rate=sampling_rate,
            hop_length=hop_length,
            mel_bins=mel_bins,
            text_length=text_length,
            maximum_hertz=maximum_hertz,
            profiles=profiles,
        )
        _check_parts(self)
        self.geometry = _geometry(self)
        self.folds_guidance = is_distilled(unet)
        if isinstance(vocoder, GriffinLimVocoder):
            # accelerate's hook moves parameters, and this vocoder has none: it stays on the device.
            self.model_cpu_offload_seq = "text_encoder->unet->vae"
            self._exclude_from_cpu_offload = ["vocoder"]
        for part in (text_encoder, unet, vae, vocoder):
            part.eval().requires_grad_(False)

    # ----------------------------------------------------------------------------------------------- sizes

    @property
    def description(self) -> GenerationModel:
        """See `LatentPipeline`."""
        config, geometry = self.config, self.geometry
        model = GenerationModel(
            model=UNVERSIONED,
            geometry=ModelGeometry(
                sampling_rate=geometry.sampling_rate,
                hop_length=geometry.hop_length,
                mel_bins=geometry.mel_bins,
                latent_channels=geometry.latent_channels,
                latent_downsampling=geometry.latent_downsampling,
                duration_grid=geometry.grid * geometry.frame_multiple,
            ),
            limits=Limits(
                min_duration=geometry.min_duration,
                max_duration=geometry.max_duration,
                max_steps=self.scheduler.config.num_train_timesteps,
                schedulers=DISTILLED_SCHEDULERS if self.folds_guidance else SCHEDULERS,
            ),
            defaults=Defaults(
                duration=config.default_duration,
                num_inference_steps=config.default_num_inference_steps,
                guidance_scale=config.default_guidance_scale,
                scheduler=config.default_scheduler,
                sampling_rate=geometry.sampling_rate,
            ),
        )
        return with_profiles(model, config.profiles)

    def steps(self, asked: int, duration: float) -> int:
        """See `LatentPipeline`: a distilled denoiser takes 1, 2, 4 or 8, at least as many as asked for."""
        if not self.folds_guidance:
            return asked
        return next((steps for steps in STARTS if steps >= asked), max(STARTS))

    @property
    def adaptable(self) -> nn.Module:
        """See `LatentPipeline`."""
        return cast(nn.Module, self.unet)

    def latent_frames(self, duration: float) -> int:
        """See `LatentPipeline`."""
        return self.geometry.latent_frames(duration)

    def latent_samples(self, duration: float) -> int:
        """See `LatentPipeline`."""
        geometry = self.geometry
        return geometry.latent_frames(duration) * geometry.latent_downsampling * geometry.hop_length

    def latent_shape(self, duration: float) -> tuple[int, int, int]:
        """Return the shape (C, T, F) of the latents of a clip of `duration` seconds."""
        return self.geometry.latent_shape(duration)

    def noise(self, duration: float, generator: Generator) -> Tensor:
        """See `LatentPipeline`."""
        return self.prepare_latents(1, duration, generator)

    def solver(self, name: str, steps: int) -> Solver:
        """See `LatentPipeline`."""
        scheduler = self.make_scheduler(name)
        self.set_timesteps(scheduler, steps)
        return JumpSolver(scheduler) if isinstance(scheduler, JumpScheduler) else VelocitySolver(scheduler)

    @torch.no_grad()
    def predict(
        self,
        latents_BCTF: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor | None = None,
        jumps_B2: Tensor | None = None,
    ) -> Tensor:
        """Call the denoiser: v [B, C, T, F] in float32, for latents of any float type.

        `timesteps_B` may differ between the rows (0 to 999).
        """
        device, dtype = self.unet.device, self.unet.dtype
        latents_BCTF, timesteps_B = latents_BCTF.to(device, dtype), timesteps_B.to(device)
        jumps_B2 = jumps_B2.to(device) if self.folds_guidance and jumps_B2 is not None else None
        text = conditioning.to(device, dtype)
        return velocity(self.unet, latents_BCTF, timesteps_B, text, jumps_B2=jumps_B2).float()

    # ----------------------------------------------------------------------------------------------- sound

    @torch.no_grad()
    def encode_audio(self, waveform_BN: Tensor, *, sample: bool = False) -> Tensor:
        """See `LatentPipeline`: the scaled latents [B, C, T, F] of waveforms."""
        mel_B1TM = mel_frames(waveform_BN, self.log_mel().to(waveform_BN.device))
        posterior = self.vae.encode(mel_B1TM).latent_dist
        latents_BCTF = posterior.sample() if sample else posterior.mean
        return cast(Tensor, latents_BCTF * self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode_mel(self, latents_BCTF: Tensor) -> Tensor:
        """Return the natural-log mel spectrogram [B, T * downsampling, M] of clean latents, float32."""
        z_BCTF = latents_BCTF.to(self.device_of(self.vae), self.vae.dtype) / self.vae.config.scaling_factor
        mel_B1TM = self.vae.decode(z_BCTF, return_dict=False)[0]
        return cast(Tensor, mel_B1TM.squeeze(1).float())

    @torch.no_grad()
    def decode(self, latents_BCTF: Tensor, samples: int | None = None) -> Tensor:
        """Return the waveform [B, N] in [-1, 1], float32, of clean latents, cut to `samples` unless None.

        A clip that overshoots full scale is turned down as a whole: it is neither clipped nor wrapped.
        """
        mel_BTM = self.decode_mel(latents_BCTF)
        waveform_BN = self.vocoder(mel_BTM.to(self.device_of(self.vocoder), _compute_dtype(self.vocoder)))
        return within_full_scale(waveform_BN[:, :samples].float())

    def preview(self, latents_BCTF: Tensor, samples: int) -> Tensor:
        """See `LatentPipeline`."""
        return self.decode_mel(latents_BCTF)[:, : math.ceil(samples / self.geometry.hop_length)]

    def make_scheduler(self, name: str | None = None) -> SchedulerMixin | JumpScheduler:
        """Return a new scheduler by name (None: the model's default), with this model's noise schedule."""
        make = jump_scheduler if self.folds_guidance else make_scheduler
        return make(name or self.config.default_scheduler, self.scheduler.config)

    def log_mel(self) -> LogMel:
        """Return the spectrogram that the autoencoder was trained on."""
        geometry = self.geometry
        return LogMel(
            sampling_rate=geometry.sampling_rate,
            hop_length=geometry.hop_length,
            mel_bins=geometry.mel_bins,
            maximum_hertz=self.config.maximum_hertz,
        )


def _compute_dtype(module: torch.nn.Module) -> torch.dtype:
    """Return the float type that `module` computes in: its parameters', float32 where it has none."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _check_parts(pipeline: TangoPipeline) -> None:
    """Raise `ModelFormatError` where one part's output is not the next part's input."""
    unet, vae, config = pipeline.unet.config, pipeline.vae.config, pipeline.config
    vocoder = pipeline.vocoder.config
    pairs = (
        ("unet.cross_attention_dim", unet.cross_attention_dim, "text_encoder.hidden_size",
         pipeline.text_encoder.config.hidden_size),
        ("unet.in_channels", unet.in_channels, "vae.latent_channels", vae.latent_channels),
        ("unet.out_channels", unet.out_channels, "unet.in_channels", unet.in_channels),
        ("vae.out_channels", vae.out_channels, "one spectrogram", 1),
        ("vocoder.sampling_rate", vocoder.sampling_rate, "sampling_rate", config.sampling_rate),
        ("vocoder.model_in_dim", vocoder.model_in_dim, "mel_bins", config.mel_bins),
        ("vocoder's hop", _vocoder_hop(pipeline.vocoder), "hop_length", config.hop_length),
    )  # fmt: skip
    wrong = [f"{a} is {x} but {b} is {y}" for a, x, b, y in pairs if x != y]
    if wrong:
        raise ModelFormatError("the parts do not fit together: " + "; ".join(wrong))


def _vocoder_hop(vocoder: SpeechT5HifiGan | GriffinLimVocoder) -> int:
    """Return the number of samples that `vocoder` generates per mel frame."""
    config = vocoder.config
    return (
        int(config.hop_length) if isinstance(vocoder, GriffinLimVocoder) else math.prod(config.upsample_rates)
    )


def _geometry(pipeline: TangoPipeline) -> Geometry:
    """Return the sizes of `pipeline`, from its parts' own configs."""
    config, unet, vae = pipeline.config, pipeline.unet.config, pipeline.vae.config
    return Geometry(
        sampling_rate=config.sampling_rate,
        hop_length=config.hop_length,
        mel_bins=config.mel_bins,
        latent_channels=unet.in_channels,
        latent_downsampling=2 ** (len(vae.block_out_channels) - 1),
        frame_multiple=2 ** (len(unet.block_out_channels) - 1),
        default_duration=config.default_duration,
        max_duration=config.max_duration,
    )
