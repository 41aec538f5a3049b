"""`AudioPipeline`: the call of a text-to-audio pipeline, with the arguments of diffusers' audio pipelines.

Shapes: B clips, L text tokens, D text width, X the family's shape of latents, N samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Final, Self, cast

import diffusers
import torch
from diffusers import AudioPipelineOutput, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn

from services.api.generation import GenerationModel, profile_fault
from services.audio.resampling import resample
from services.errors import FieldViolation, InvalidInputError
from services.models.latent import Conditioning, guide, guided_steps, takes_generator, targets_of
from services.models.prompts import TextPrompts

Generators = Generator | Sequence[Generator] | None
"""One generator for a batch (as diffusers and upstream do), one for each clip, or torch's global one."""

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""Called after each denoising step as ``callback(pipeline, step, timestep, tensors)``; the tensors that it
returns replace the pipeline's."""

OUTPUT_TYPES: Final = ("np", "pt", "latent")
"""NumPy's arrays, torch's tensors, or the clean latents."""


@dataclass
class AudioOutput(AudioPipelineOutput):  # type: ignore[misc]
    """The result of a call."""

    audios: Any
    """Float32 waveforms [B, N] in [-1, 1], or latents [B, X]; the clips of one prompt are adjacent."""
    sampling_rate: int
    """Sampling rate of the waveforms, in hertz."""


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """Prompts as they were given: sentences, or what `encode_prompt` returned of them."""

    name: str
    given: str | Sequence[str] | None
    embeds_BLD: Tensor | None
    mask_BL: Tensor | None

    @property
    def prompts(self) -> list[str] | None:
        """Return the sentences, None where there are none."""
        if self.given is None:
            return None
        return list(self.given) if isinstance(self.given, list | tuple) else [cast(str, self.given)]

    @property
    def count(self) -> int:
        """Return the number of prompts."""
        given = self.embeds_BLD if self.prompts is None else self.prompts
        return 0 if given is None else len(given)

    def for_each(self, count: int) -> "_Text":
        """Return these negative prompts, one sentence repeated `count` times; the empty one without any."""
        if self.embeds_BLD is not None or not (self.given is None or isinstance(self.given, str)):
            return self
        return replace(self, given=[self.given or ""] * count)

    def conditioning(self) -> Conditioning:
        """Return the given embeddings; without a mask, no token is padding."""
        assert self.embeds_BLD is not None
        ones_BL = torch.ones(self.embeds_BLD.shape[:2], dtype=torch.bool)
        mask_BL = ones_BL if self.mask_BL is None else self.mask_BL == 1
        return Conditioning(tensors={"embeds": self.embeds_BLD, "mask": mask_BL})

    def faults(self, width: int, count: int) -> Iterator[FieldViolation]:
        """Yield what is wrong with them as those of `count` prompts, for embeddings of `width`."""
        embeds, mask = f"{self.name}_embeds", f"{self.name.removesuffix('prompt')}attention_mask"
        if self.given is not None and self.embeds_BLD is not None:
            yield FieldViolation(embeds, f"given with {self.name}; give one of the two")
        elif self.embeds_BLD is not None:
            if self.embeds_BLD.ndim != 3 or self.embeds_BLD.shape[2] != width:
                text = f"shape {tuple(self.embeds_BLD.shape)}; give [prompts, tokens, {width}]"
                yield FieldViolation(embeds, text)
            elif self.mask_BL is not None and self.mask_BL.shape != self.embeds_BLD.shape[:2]:
                text = f"shape {tuple(self.mask_BL.shape)}; {embeds} needs {tuple(self.embeds_BLD.shape[:2])}"
                yield FieldViolation(mask, text)
        elif self.mask_BL is not None:
            yield FieldViolation(mask, f"given without {embeds}; leave it out")
        if not self.count or not all(isinstance(prompt, str) for prompt in self.prompts or ()):
            yield FieldViolation(self.name, "no text; give a string, a list of strings, or embeddings")
        elif self.count != count:
            text = f"{self.count} for {count} prompts; give one, or as many as prompts"
            yield FieldViolation(self.name if self.embeds_BLD is None else embeds, text)


class AudioPipeline(TextPrompts, DiffusionPipeline, ABC):  # type: ignore[misc]
    """Base of the families' pipelines: prompts to clips in one call.

    A family implements `LatentPipeline`, `latent_shape` and `make_scheduler`. `pipeline.scheduler` is used
    once another one was assigned or given to `from_pretrained`. The one of the model's folder describes the
    noise of training; without another, the model's `default_scheduler` denoises.
    """

    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    predictions: ClassVar[tuple[str | None, ...]]
    """Values of a scheduler's ``prediction_type`` that fit what the denoiser predicts."""
    training_scheduler: ClassVar[str]
    """Class of the scheduler in a model's folder."""

    folds_guidance = False
    """See `LatentPipeline`."""
    scheduler: Any
    _interrupt = False
    """A callback sets this to end the denoising after its step."""

    @property
    @abstractmethod
    def description(self) -> GenerationModel:
        """See `LatentPipeline`."""

    @abstractmethod
    def latent_shape(self, duration: float) -> tuple[int, ...]:
        """Return the shape X of the latents of a clip of `duration` seconds."""

    @property
    def adaptable(self) -> nn.Module | None:
        """See `LatentPipeline`: none, unless a family says otherwise."""
        return None

    def steps(self, asked: int, duration: float) -> int:
        """See `LatentPipeline`: a diffusion model takes as many steps as it is asked for."""
        return asked

    @abstractmethod
    def make_scheduler(self, name: str | None = None) -> Any:
        """Return a new scheduler by name (None: the model's default), with this model's noise schedule."""

    @abstractmethod
    def predict(
        self,
        latents_BX: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor,
        jumps_B2: Tensor | None = None,
        /,
    ) -> Tensor:
        """See `LatentPipeline`."""

    @abstractmethod
    def decode(self, latents_BX: Tensor, samples: int, /) -> Tensor:
        """See `LatentPipeline`."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let `DiffusionPipeline.from_pretrained` find the class: it searches diffusers' namespace only."""
        super().__init_subclass__(**options)
        setattr(diffusers, cls.__name__, cls)

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Self:
        """Load a pipeline as diffusers does. A `scheduler` that is given is used."""
        pipeline = cast(Self, super().from_pretrained(folder, **options))
        if options.get("scheduler") is not None:
            pipeline._training_scheduler = None
        return pipeline

    def register_modules(self, **modules: Any) -> None:
        """Register the parts, and remember the scheduler of the model's folder."""
        super().register_modules(**modules)
        scheduler = modules.get("scheduler")
        if scheduler is not None:
            is_default = type(scheduler).__name__ == self.training_scheduler
            self._training_scheduler = scheduler if is_default else None

    def prepare_latents(self, count: int, duration: float, generator: Generators = None) -> Tensor:
        """Draw unit noise [count, X] for clips of `duration` seconds, float32, on the pipeline's device.

        It is drawn on the generator's device (CPU for `clip_generator`) and then moved, so that it does not
        depend on the pipeline's device. A list gives every clip its own generator; one generator draws the
        batch at once, as diffusers and upstream do.
        """
        generators = generator if generator is None or isinstance(generator, Generator) else list(generator)
        first = generators[0] if isinstance(generators, list) else generators
        drawn_on = torch.device("cpu") if first is None else first.device
        shape = (count, *self.latent_shape(duration))
        noise_BX: Tensor = randn_tensor(shape, generator=generators, device=drawn_on, dtype=torch.float32)
        return noise_BX.to(self.device)

    @property
    def device(self) -> torch.device:
        """See `LatentPipeline`. Parts that `enable_sequential_cpu_offload` keeps elsewhere count, too."""
        found = cast(torch.device, super().device)
        return cast(torch.device, self._execution_device) if found.type == "meta" else found

    def device_of(self, part: Any) -> torch.device:
        """Return the device that `part` computes on, also where it is offloaded to the CPU until then."""
        hook = getattr(part, "_hf_hook", None)
        found = cast(torch.device, getattr(hook, "execution_device", None) or part.device)
        return self.device if found.type == "meta" else found

    def set_timesteps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        """Prepare `scheduler` for `steps` steps from noise to a clip."""
        scheduler.set_timesteps(steps, device=device)

    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `prompt_embeds`, `attention_mask`, `negative_prompt_embeds`, `negative_attention_mask`."""
        text = _Text("prompt", prompt, None, None)
        negative = _Text("negative_prompt", negative_prompt, None, None).for_each(text.count)
        found, other = self._encoded([text, negative])
        assert other is not None
        return found["embeds"], found["mask"], other["embeds"], other["mask"]

    @torch.no_grad()
    def denoise(
        self,
        latents_BX: Tensor,
        conditional: Conditioning,
        unconditional: Conditioning | None = None,
        *,
        guidance_scale: float,
        guidance_stop: float = 1.0,
        num_inference_steps: int,
        duration: float = 0.0,
        scheduler: str | None = None,
        generator: Generators = None,
        on_step_end: StepCallback | None = None,
        tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Run the whole loop from unit noise to clean latents [B, X].

        Guidance takes place where `guidance_scale` is above 1, in the first `guidance_stop` of the steps, and
        then needs `unconditional` (of the same length as `conditional`; a negative prompt takes its place).
        `duration`, in seconds, is for families that are conditioned on it. `generator` feeds schedulers that
        draw noise (`ddpm`).
        """
        if guidance_scale > 1 and not self.folds_guidance and unconditional is None:
            raise ValueError("guidance_scale above 1 needs the unconditional embeddings")
        solver = self._chosen_scheduler(scheduler)
        self.set_timesteps(solver, num_inference_steps, latents_BX.device)
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(0)  # otherwise the first step searches for its timestep; see `Solver`
        noise = _step_arguments(solver, generator)
        guided = guided_steps(
            guidance_scale, guidance_stop, len(solver.timesteps), folded=self.folds_guidance
        )
        texts = {"prompt_embeds": conditional}
        if guided and unconditional is not None:
            texts = {"negative_prompt_embeds": unconditional, **texts}
        targets = targets_of(solver)
        latents_BX = latents_BX * getattr(solver, "init_noise_sigma", 1.0)
        self._interrupt = False
        with self.progress_bar(total=len(solver.timesteps)) as progress:
            for step, timestep in enumerate(solver.timesteps):
                used = list(texts.values()) if step < guided else [texts["prompt_embeds"]]
                inputs_BX = torch.cat([latents_BX] * len(used))
                if hasattr(solver, "scale_model_input"):
                    inputs_BX = solver.scale_model_input(inputs_BX, timestep)
                timesteps_B = timestep.expand(len(inputs_BX))
                seconds_B = torch.full_like(timesteps_B, duration, dtype=torch.float32)
                jumps_B2 = seconds_B.new_tensor([[guidance_scale, targets[step]]]).expand(len(inputs_BX), 2)
                output_BX = self.predict(inputs_BX, timesteps_B, Conditioning.cat(used), seconds_B, jumps_B2)
                if step < guided:
                    unconditional_BX, conditional_BX = output_BX.chunk(2)
                    output_BX = guide(unconditional_BX, conditional_BX, guidance_scale)
                latents_BX = solver.step(output_BX, timestep, latents_BX, return_dict=False, **noise)[0]
                progress.update()
                if on_step_end is not None:
                    own = {"latents": latents_BX} | {name: text["embeds"] for name, text in texts.items()}
                    shown = {name: own[name] for name in tensor_inputs if name in own}
                    own |= on_step_end(self, step, timestep, shown) or {}
                    latents_BX = own["latents"]
                    texts = {name: text.embedded(own[name]) for name, text in texts.items()}
                if self._interrupt:
                    break
        return latents_BX

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_waveforms_per_prompt: int = 1,
        *,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        scheduler: str | None = None,
        output_sampling_rate: int | None = None,
        guidance_stop: float | None = None,
        profile: str | None = None,
    ) -> AudioOutput:
        """Generate `num_waveforms_per_prompt` clips of `audio_length_in_s` seconds for each prompt.

        Arguments have diffusers' meanings; what is left out takes the model's default. `generator` is one for
        the batch or one for each clip (`clip_generator`); `latents` replaces the first noise [B, X].
        `prompt_embeds` [B, L, D] and `attention_mask` [B, L] (None: no padding) replace the prompt, as
        `encode_prompt` returns them. `return_dict=False` returns ``(audios,)``. `scheduler` names one of the
        model's schedulers, `output_sampling_rate` resamples the waveforms. Guidance stops after the share
        `guidance_stop` of the steps. `profile` names one of the model's profiles, whose settings are then the
        defaults. Raises `InvalidInputError` with every invalid argument at once.
        """
        defaults = self.description.defaults.under(profile or "")
        duration = defaults.duration if audio_length_in_s is None else audio_length_in_s
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        stop = defaults.guidance_stop if guidance_stop is None else guidance_stop
        if profile and scheduler is None:
            scheduler = defaults.scheduler
        text = _Text("prompt", prompt, prompt_embeds, attention_mask)
        negative = _Text(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_attention_mask
        ).for_each(text.count)
        self.check_inputs(
            text, negative, duration, steps, scale, stop, num_waveforms_per_prompt, generator, latents,
            scheduler, profile or "", output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip

        guided = scale > 1 and not self.folds_guidance
        conditional, unconditional = self._encoded([text, negative] if guided else [text])
        if latents is None:
            latents = self.prepare_latents(text.count * num_waveforms_per_prompt, duration, generator)
        latents = self.denoise(
            latents.to(self._execution_device, torch.float32),
            conditional.repeat_interleave(num_waveforms_per_prompt),
            unconditional and unconditional.repeat_interleave(num_waveforms_per_prompt),
            guidance_scale=scale,
            guidance_stop=stop,
            num_inference_steps=self.steps(steps, duration),
            duration=duration,
            scheduler=scheduler,
            generator=generator,
            on_step_end=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        rate = self.description.geometry.sampling_rate
        audios: Any = latents
        if output_type != "latent":
            decoded_BN = self.decode(latents, round(duration * rate)).cpu().numpy()
            audios = resample(decoded_BN, rate, output_sampling_rate or rate).clip(-1.0, 1.0)
        if output_type == "pt":
            audios = torch.from_numpy(audios).to(latents.device)
        self.maybe_free_model_hooks()
        found = AudioOutput(audios=audios, sampling_rate=output_sampling_rate or rate)
        return found if return_dict else cast(AudioOutput, (audios,))

    def check_inputs(
        self,
        text: _Text,
        negative: _Text,
        duration: float,
        steps: int,
        scale: float,
        stop: float,
        clips: int,
        generator: Generators,
        latents: Tensor | None,
        scheduler: str | None,
        profile: str,
        output_type: str,
        tensor_inputs: Sequence[str],
    ) -> None:
        """Raise `InvalidInputError` with everything that is wrong with the arguments of `__call__`."""
        limits, count, width = (
            self.description.limits,
            text.count * clips,
            self.text_encoder.config.hidden_size,
        )
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        unknown_profile = profile_fault(profile, limits.profiles)
        predicts = self._chosen_scheduler(None).config.get("prediction_type") if scheduler is None else None
        checks = (
            (
                "audio_length_in_s",
                isinstance(duration, Real) and 0 < duration <= limits.max_duration,
                f"{duration!r} s; give more than 0 and at most {limits.max_duration} s",
            ),
            ("num_inference_steps", 1 <= steps <= limits.max_steps, f"{steps}; give 1 to {limits.max_steps}"),
            ("guidance_scale", 0 <= scale < float("inf"), f"{scale}; give a number of 0 or more"),
            ("guidance_stop", 0 <= stop <= 1, f"{stop}; give a share of the steps, 0 to 1"),
            ("profile", unknown_profile is None, unknown_profile or ""),
            ("num_waveforms_per_prompt", clips >= 1, f"{clips}; give 1 or more"),
            (
                "scheduler",
                scheduler is None or scheduler in limits.schedulers,
                f"unknown scheduler {scheduler!r}; use one of {', '.join(limits.schedulers)}, or assign "
                "one of diffusers' to pipeline.scheduler",
            ),
            (
                "scheduler",
                scheduler is not None or predicts in self.predictions,
                f"its prediction_type is {predicts!r}, but this model's is {self.predictions[0]!r}; make it "
                "by from_config(pipeline.scheduler.config)",
            ),
            (
                "scheduler",
                scheduler is not None
                or not self.folds_guidance
                or hasattr(self._chosen_scheduler(None), "targets"),
                f"not for a distilled model; use one of {', '.join(limits.schedulers)}",
            ),
            (
                "generator",
                generator is None or isinstance(generator, Generator) or len(generator) == count,
                f"not one for each of {count} clips; give one generator, or {count}",
            ),
            (
                "output_type",
                output_type in OUTPUT_TYPES,
                f"{output_type!r}; use one of {', '.join(OUTPUT_TYPES)}",
            ),
            (
                "callback_on_step_end_tensor_inputs",
                not unknown,
                f"unknown: {', '.join(unknown)}; use {', '.join(self._callback_tensor_inputs)}",
            ),
        )
        violations = list(text.faults(width, text.count)) or list(negative.faults(width, text.count))
        violations += [FieldViolation(field, fault) for field, right, fault in checks if not right]
        if latents is not None and not violations:
            expected = (count, *self.latent_shape(duration))
            if tuple(latents.shape) != expected:
                fault = f"shape {tuple(latents.shape)}; these prompts and this duration need {expected}"
                violations = [FieldViolation("latents", fault)]
        if violations:
            raise InvalidInputError(*violations)

    def _encoded(self, texts: Sequence[_Text]) -> tuple[Conditioning, Conditioning | None]:
        """Encode the prompts and, if there are two `texts`, the negative prompts, padded to one length."""
        tokens = [self.token_count(prompt) for text in texts for prompt in text.prompts or ()]
        longest = self.config.text_length or min(max(tokens, default=1), self.max_prompt_tokens)
        device, dtype = self._execution_device, self.text_encoder.dtype
        found = [
            text.conditioning() if text.prompts is None else self.encode(text.prompts, length=longest)
            for text in texts
        ]
        length = max(one.length for one in found)
        first, *rest = (one.to(device, dtype).padded(length) for one in found)
        return first, rest[0] if rest else None

    def _chosen_scheduler(self, name: str | None) -> Any:
        """Return the scheduler by name; for None the one that was assigned, or the model's default."""
        if name is None and self.scheduler is not self._training_scheduler:
            return self.scheduler
        return self.make_scheduler(name)


def _step_arguments(scheduler: Any, generator: Generators) -> dict[str, Any]:
    """Return the `generator` argument for schedulers that take one."""
    if generator is None or not takes_generator(scheduler):
        return {}
    return {"generator": generator if isinstance(generator, Generator) else list(generator)}
