"""`TangoPipeline`: prompt to waveform, with the parts of Tango 2 (arXiv 2404.09956).

Shapes: B batch, C channels, T latent frames (time), F latent mel bins, L text tokens, D text width,
N samples, M mel bins.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from transformers import PreTrainedTokenizerBase, SpeechT5HifiGan, T5EncoderModel

from services.api.generation import Defaults, GenerationModel, Limits, ModelGeometry
from services.api.model import UNVERSIONED
from services.audio.resampling import resample
from services.errors import FieldViolation, InvalidInputError, ModelFormatError
from services.models.latent import Conditioning, Solver, guide, takes_generator, within_full_scale
from services.models.mel import LogMel, mel_frames
from services.models.prompts import T5Prompts
from services.models.tango.geometry import Geometry
from services.models.tango.schedulers import SCHEDULERS, VelocitySolver, make_scheduler
from services.models.vocoder import GriffinLimVocoder

StepCallback = Callable[[int, int, Tensor], None]
"""Called after every denoising step with (step from 0, timestep, latents [B, C, T, F])."""

Generators = Generator | Sequence[Generator] | None
"""One generator for a batch (as diffusers and upstream do), one for each clip, or torch's global one."""


@dataclass
class TangoOutput(BaseOutput):  # type: ignore[misc]
    """The result of `TangoPipeline.__call__`."""

    waveforms_BN: NDArray[np.float32]
    """Float32 waveforms [B, N] in [-1, 1]; the clips of one prompt are adjacent."""
    sampling_rate: int
    """Sampling rate of `waveforms_BN`, in hertz."""


def velocity(
    unet: nn.Module,
    latents_BCTF: Tensor,
    timesteps_B: Tensor,
    conditioning: Conditioning,
    seconds_B: Tensor | None = None,
) -> Tensor:
    """Call the denoiser: v [B, C, T, F] (arXiv 2202.00512). Tango is not conditioned on the duration.

    The text mask is mandatory: without it the padding changes the prediction by half of its size.
    """
    v_BCTF = unet(
        latents_BCTF,
        timesteps_B,
        encoder_hidden_states=conditioning["embeds"],
        encoder_attention_mask=conditioning["mask"],
        return_dict=False,
    )[0]
    return cast(Tensor, v_BCTF)


class TangoPipeline(T5Prompts, DiffusionPipeline):  # type: ignore[misc]
    """Text to audio by latent diffusion; inference only.

    Parts: a T5 encoder reads the prompt, a UNet denoises latents [B, C, T, F] by v-prediction, a variational
    autoencoder turns them into a log-mel spectrogram, a vocoder turns that into a waveform. `encode`,
    `predict`, `denoise` and `decode` can be used apart. The order of guidance's halves, the mandatory text
    mask and the padded empty prompt as the unconditional text are upstream's (`models.py`, `inference` and
    `encode_text_classifier_free`).

    Raises `ModelFormatError` where the parts do not fit together.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae->vocoder"

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    vocoder: SpeechT5HifiGan | GriffinLimVocoder
    scheduler: SchedulerMixin

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
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
    ) -> None:
        """Durations in seconds; `text_length` fixes the padded prompt length (None: as long as needed)."""
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
        )
        _check_parts(self)
        self.geometry = _geometry(self)
        for part in (text_encoder, unet, vae, vocoder):
            part.eval().requires_grad_(False)

    # ----------------------------------------------------------------------------------------------- sizes

    @property
    def description(self) -> GenerationModel:
        """See `LatentPipeline`."""
        config, geometry = self.config, self.geometry
        return GenerationModel(
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
                schedulers=SCHEDULERS,
            ),
            defaults=Defaults(
                duration=config.default_duration,
                num_inference_steps=config.default_num_inference_steps,
                guidance_scale=config.default_guidance_scale,
                scheduler=config.default_scheduler,
                sampling_rate=geometry.sampling_rate,
            ),
        )

    def latent_frames(self, duration: float) -> int:
        """See `LatentPipeline`."""
        return self.geometry.latent_frames(duration)

    def latent_samples(self, duration: float) -> int:
        """See `LatentPipeline`."""
        geometry = self.geometry
        return geometry.latent_frames(duration) * geometry.latent_downsampling * geometry.hop_length

    # ------------------------------------------------------------------------------------------- denoising

    def prepare_latents(self, count: int, duration: float, generator: Generators = None) -> Tensor:
        """Draw unit noise [count, C, T, F] for clips of `duration` seconds, float32, on its device.

        It is drawn on the generator's device (CPU for `clip_generator`) and then moved, so that it does not
        depend on the pipeline's device. A list gives every clip its own generator; one generator draws the
        batch at once, as diffusers and upstream do.
        """
        shape = (count, *self.geometry.latent_shape(duration))
        generators = generator if generator is None or isinstance(generator, Generator) else list(generator)
        drawn_on = torch.device("cpu") if generators is None else None
        noise_BCTF: Tensor = randn_tensor(shape, generator=generators, device=drawn_on, dtype=torch.float32)
        return noise_BCTF.to(self.device)

    def noise(self, duration: float, generator: Generator) -> Tensor:
        """See `LatentPipeline`."""
        return self.prepare_latents(1, duration, generator)

    def solver(self, name: str, steps: int) -> Solver:
        """See `LatentPipeline`."""
        scheduler = self.make_scheduler(name)
        scheduler.set_timesteps(steps)
        return VelocitySolver(scheduler)

    @torch.no_grad()
    def predict(
        self,
        latents_BCTF: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor | None = None,
    ) -> Tensor:
        """Call the denoiser: v [B, C, T, F] in float32, for latents of any float type.

        `timesteps_B` may differ between the rows (0 to 999).
        """
        device, dtype = self.unet.device, self.unet.dtype
        latents_BCTF, timesteps_B = latents_BCTF.to(device, dtype), timesteps_B.to(device)
        return velocity(self.unet, latents_BCTF, timesteps_B, conditioning.to(device, dtype)).float()

    @torch.no_grad()
    def denoise(
        self,
        latents_BCTF: Tensor,
        conditional: Conditioning,
        unconditional: Conditioning | None = None,
        *,
        guidance_scale: float,
        num_inference_steps: int,
        scheduler: SchedulerMixin | str | None = None,
        generator: Generators = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Run the whole loop from unit noise to clean latents [B, C, T, F].

        Guidance takes place only where `guidance_scale` is above 1, and then needs `unconditional` (of the
        same length as `conditional`; a negative prompt takes its place). `generator` feeds schedulers that
        draw noise (`ddpm`).
        """
        solver = self._scheduler(scheduler)
        solver.set_timesteps(num_inference_steps, device=latents_BCTF.device)
        guided = guidance_scale > 1
        if guided and unconditional is None:
            raise ValueError("guidance_scale above 1 needs the unconditional embeddings")
        text = (
            conditional
            if unconditional is None or not guided
            else Conditioning.cat([unconditional, conditional])
        )
        noise = _step_arguments(solver, generator)
        for step, timestep in enumerate(solver.timesteps):
            inputs_BCTF = torch.cat([latents_BCTF] * 2) if guided else latents_BCTF
            v_BCTF = self.predict(inputs_BCTF, timestep.expand(len(inputs_BCTF)), text)
            if guided:
                v_unconditional, v_conditional = v_BCTF.chunk(2)
                v_BCTF = guide(v_unconditional, v_conditional, guidance_scale)
            latents_BCTF = solver.step(v_BCTF, timestep, latents_BCTF, return_dict=False, **noise)[0]
            if callback is not None:
                callback(step, int(timestep), latents_BCTF)
        return latents_BCTF

    # ----------------------------------------------------------------------------------------------- sound

    @torch.no_grad()
    def encode_audio(self, waveform_BN: Tensor) -> Tensor:
        """Return the scaled latents [B, C, T, F] of waveforms: the means of the autoencoder's posteriors."""
        mel_B1TM = mel_frames(waveform_BN, self._log_mel().to(waveform_BN.device))
        mean_BCTF = self.vae.encode(mel_B1TM).latent_dist.mean * self.vae.config.scaling_factor
        return cast(Tensor, mean_BCTF)

    @torch.no_grad()
    def decode_mel(self, latents_BCTF: Tensor) -> Tensor:
        """Return the natural-log mel spectrogram [B, T * downsampling, M] of clean latents, float32."""
        z_BCTF = latents_BCTF.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        mel_B1TM = self.vae.decode(z_BCTF, return_dict=False)[0]
        return cast(Tensor, mel_B1TM.squeeze(1).float())

    @torch.no_grad()
    def decode(self, latents_BCTF: Tensor, samples: int | None = None) -> Tensor:
        """Return the waveform [B, N] in [-1, 1], float32, of clean latents, cut to `samples` unless None.

        A clip that overshoots full scale is turned down as a whole: it is neither clipped nor wrapped.
        """
        mel_BTM = self.decode_mel(latents_BCTF)
        waveform_BN = self.vocoder(mel_BTM.to(self.vocoder.device, _compute_dtype(self.vocoder)))
        return within_full_scale(waveform_BN[:, :samples].float())

    def preview(self, latents_BCTF: Tensor, samples: int) -> Tensor:
        """See `LatentPipeline`."""
        return self.decode_mel(latents_BCTF)[:, : math.ceil(samples / self.geometry.hop_length)]

    # ------------------------------------------------------------------------------------------ everything

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        duration: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        clips_per_prompt: int = 1,
        scheduler: SchedulerMixin | str | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_sampling_rate: int | None = None,
        callback: StepCallback | None = None,
    ) -> TangoOutput:
        """Generate `clips_per_prompt` clips of `duration` seconds for every prompt.

        What is left out takes the model's default. `generator` is one for the batch or one for each clip
        (`clip_generator`); `latents` replaces the first noise [B, C, T, F]. `output_sampling_rate` resamples
        the result. Raises `InvalidInputError` with every wrong argument at once.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        duration = self.config.default_duration if duration is None else duration
        steps = (
            self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        )
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        negatives = _negatives(negative_prompt, len(prompts))
        count = len(prompts) * clips_per_prompt
        self._check_call(
            prompts, negatives, duration, steps, scale, clips_per_prompt, scheduler, generator, latents
        )

        conditional = self.encode(prompts)
        unconditional = self.encode(negatives, length=conditional.length) if scale > 1 else None
        if latents is None:
            latents = self.prepare_latents(count, duration, generator)
        latents = self.denoise(
            latents.to(self.device, torch.float32),
            conditional.repeat_interleave(clips_per_prompt),
            unconditional.repeat_interleave(clips_per_prompt) if unconditional is not None else None,
            guidance_scale=scale,
            num_inference_steps=steps,
            scheduler=scheduler,
            generator=generator,
            callback=callback,
        )
        samples = self.geometry.samples(duration)
        waveforms_BN = self.decode(latents, samples).cpu().numpy()
        rate = output_sampling_rate or self.geometry.sampling_rate
        resampled_BN = resample(waveforms_BN, self.geometry.sampling_rate, rate).clip(-1.0, 1.0)
        return TangoOutput(waveforms_BN=resampled_BN, sampling_rate=rate)

    def make_scheduler(self, name: str | None = None) -> SchedulerMixin:
        """Return a new scheduler by name (None: the model's default), with this model's noise schedule."""
        return make_scheduler(name or self.config.default_scheduler, self.scheduler.config)

    def _log_mel(self) -> LogMel:
        """Return the spectrogram that the autoencoder was trained on."""
        geometry = self.geometry
        return LogMel(
            sampling_rate=geometry.sampling_rate,
            hop_length=geometry.hop_length,
            mel_bins=geometry.mel_bins,
        )

    def _scheduler(self, scheduler: SchedulerMixin | str | None) -> SchedulerMixin:
        if scheduler is None or isinstance(scheduler, str):
            return self.make_scheduler(scheduler)
        return scheduler

    def _check_call(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        duration: float,
        steps: int,
        scale: float,
        clips: int,
        scheduler: SchedulerMixin | str | None,
        generator: Generators,
        latents: Tensor | None,
    ) -> None:
        """Raise `InvalidInputError` with everything that is wrong with the arguments of `__call__`."""
        longest = self.geometry.max_duration
        trained_steps = self.scheduler.config.num_train_timesteps
        count = len(prompts) * clips
        checks = (
            ("prompt", bool(prompts), "no prompt; give at least one"),
            (
                "negative_prompt",
                len(negatives) == len(prompts),
                f"{len(negatives)} for {len(prompts)} prompts; give one, or as many as prompts",
            ),
            ("duration", 0 < duration <= longest, f"{duration} s; give more than 0 and at most {longest} s"),
            ("num_inference_steps", 1 <= steps <= trained_steps, f"{steps}; give 1 to {trained_steps}"),
            ("guidance_scale", 0 <= scale < float("inf"), f"{scale}; give a number of 0 or more"),
            ("clips_per_prompt", clips >= 1, f"{clips}; give 1 or more"),
            (
                "scheduler",
                not isinstance(scheduler, str) or scheduler in SCHEDULERS,
                f"unknown scheduler {scheduler!r}; use one of {', '.join(SCHEDULERS)}",
            ),
            (
                "generator",
                generator is None or isinstance(generator, Generator) or len(generator) == count,
                f"not one for each of {count} clips; give one generator, or {count}",
            ),
        )
        violations = [FieldViolation(field, text) for field, right, text in checks if not right]
        if latents is not None and not violations:
            expected = (count, *self.geometry.latent_shape(duration))
            if tuple(latents.shape) != expected:
                text = f"shape {tuple(latents.shape)}; these prompts and this duration need {expected}"
                violations = [FieldViolation("latents", text)]
        if violations:
            raise InvalidInputError(*violations)


def _negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """Return a negative prompt for each of `count` prompts: the empty text where none is given."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    return list(negative_prompt)


def _compute_dtype(module: torch.nn.Module) -> torch.dtype:
    """Return the float type that `module` computes in: its parameters', float32 where it has none."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _step_arguments(scheduler: SchedulerMixin, generator: Generators) -> dict[str, Any]:
    """Return the `generator` argument for schedulers that take one."""
    if generator is None or not takes_generator(scheduler):
        return {}
    return {"generator": generator if isinstance(generator, Generator) else list(generator)}


def _check_parts(pipeline: TangoPipeline) -> None:
    """Raise `ModelFormatError` where one part's output is not the next part's input."""
    unet, vae, config = pipeline.unet.config, pipeline.vae.config, pipeline.config
    vocoder = pipeline.vocoder.config
    pairs = (
        ("unet.cross_attention_dim", unet.cross_attention_dim, "text_encoder.d_model",
         pipeline.text_encoder.config.d_model),
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
