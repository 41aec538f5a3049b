"""`DiffusionExplainer`: explains the clips of a latent-diffusion model.

Shapes: S points, X the family's shape of latents, W words, L text tokens, T latent frames, N samples.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.api.explanation import (
    ATTENTION,
    MASK,
    OCCLUSION,
    REPLACED,
    WITHOUT,
    ExplainerModel,
    Explanation,
    ExplanationProgress,
    ExplanationRequest,
    Report,
    Variant,
)
from services.api.generation import Clip, GenerationRequest
from services.audio.decoding import ReadClip
from services.audio.resampling import resample
from services.audio.words import Word, find_phrase, find_words
from services.errors import NotFiniteError, UnsupportedError
from services.models.explaining import methods
from services.models.explaining.cross_attention import cross_attention_layers
from services.models.explaining.methods import Points, Tick
from services.models.explaining.tokens import tokens_of_words
from services.models.latent import Conditioning, LatentPipeline, clip_generator, guide, guided_steps
from services.models.pipelines import Architecture

DEFAULT_ITERATIONS = 40
"""Iterations of a mask, if the request does not say: with more, masks of the mini model change little."""

_STEPS_OF_GIVEN = 12
"""Noise levels that a given clip is explained at, if they are fewer than the model's steps."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadPrompt:
    """A prompt, and what belongs to each of its words."""

    words: tuple[Word, ...]
    conditioning: Conditioning
    owners_WL: Tensor


class DiffusionExplainer:
    """An `Explainer` of a generator in this process."""

    def __init__(self, pipeline: LatentPipeline, architecture: Architecture) -> None:
        """`architecture` is the family of `pipeline`.

        Raises:
            UnsupportedError: it has no denoiser.
        """
        if architecture.denoise is None:
            name = architecture.pipeline.__name__
            raise UnsupportedError(f"{name} has no denoiser, whose use of the prompt could be explained")
        self._pipeline, self._denoise = pipeline, architecture.denoise
        self.denoiser = getattr(pipeline, architecture.denoiser)

    @property
    def description(self) -> ExplainerModel:
        """See `Explainer`. Models without readable cross-attention have the method occlusion only."""
        generation = self._pipeline.description
        readable = bool(cross_attention_layers(self.denoiser))
        learns = {"methods": (OCCLUSION, ATTENTION, MASK), "iterations": DEFAULT_ITERATIONS}
        own: Any = learns if readable else {"methods": (OCCLUSION,)}
        return ExplainerModel(
            generation=generation,
            frame_seconds=self.frame_seconds,
            explains_given=True,
            makes_variants=True,
            **own,
        )

    @property
    def frame_seconds(self) -> float:
        """Length of a latent frame in seconds."""
        geometry = self._pipeline.description.geometry
        return geometry.hop_length * geometry.latent_downsampling / geometry.sampling_rate

    def explain(self, request: ExplanationRequest, report: Report) -> Explanation:
        """See `Explainer`."""
        start = time.monotonic()
        generation = request.generation
        text = self.read(generation.prompt)
        steps = _Steps(request, len(text.words), report)
        if request.given is None:
            clean_1X, points = self.generate(generation, text.conditioning, steps.within("denoise"))
            samples = round(generation.duration * self.rate)
            clip = self._clip(clean_1X, samples, generation.seed)
        else:
            given = request.given
            points = self.noised(self.encoded(given), generation)
            mono_N = given.waveform.mean(0) if given.waveform.ndim == 2 else given.waveform
            clip = Clip.of_samples(
                np.asarray(mono_N, dtype=np.float32), given.sampling_rate, seed=generation.seed
            )
        matrix_WT, mask_size, iterations = self._attribute(request, points, text, steps.within("explain"))
        frames = max(1, min(matrix_WT.shape[1], round(generation.duration / self.frame_seconds)))
        variants = self._variants(request, text, steps.within("variant"))
        steps.finish()
        return Explanation(
            prompt=generation.prompt,
            words=tuple(word.text for word in text.words),
            # Latents are longer than the clip where its duration is off the model's grid.
            matrix_WT=self._checked(matrix_WT)[:, :frames],
            frame_seconds=self.frame_seconds,
            method=request.method,
            seed=generation.seed,
            model=self._pipeline.description.model,
            warnings=self._warnings(request, text),
            clip=clip,
            variants=variants,
            mask_size=mask_size,
            iterations=iterations,
            seconds=time.monotonic() - start,
        )

    # ------------------------------------------------------------------------------------------- parts

    @property
    def rate(self) -> int:
        """Sampling rate of the model in hertz."""
        return self._pipeline.description.geometry.sampling_rate

    def denoise(
        self, latents_BX: Tensor, timesteps_B: Tensor, conditioning: Conditioning, seconds_B: Tensor
    ) -> Tensor:
        """Call the denoiser with gradients, unless they are disabled."""
        device, dtype = self._pipeline.device, next(self.denoiser.parameters()).dtype
        return self._denoise(
            self.denoiser,
            latents_BX.to(device, dtype),
            timesteps_B.to(device),
            conditioning.to(device, dtype),
            seconds_B.to(device),
        ).float()

    def read(self, prompt: str) -> ReadPrompt:
        """Encode a prompt, and find its words."""
        length = self._pipeline.text_length(prompt)
        words = tuple(find_words(prompt))
        tokenizer = cast(Any, self._pipeline).tokenizer
        return ReadPrompt(
            words=words,
            conditioning=self._pipeline.encode([prompt], length=length),
            owners_WL=tokens_of_words(tokenizer, prompt, words, length),
        )

    @torch.no_grad()
    def generate(
        self, request: GenerationRequest, text: Conditioning, tick: Tick = lambda: None
    ) -> tuple[Tensor, Points]:
        """Return the clean latents of a clip as the engine makes them, and the points of its trajectory."""
        generator = clip_generator(request.seed)
        latents_1X = self._pipeline.noise(request.duration, generator)
        solver = self._pipeline.solver(request.scheduler, request.num_inference_steps)
        guided = guided_steps(request.guidance_scale, request.guidance_stop, len(solver.timesteps))
        both = text
        if guided:
            negative = self._pipeline.encode([request.negative_prompt], length=text.length)
            both = Conditioning.cat([negative.to(text["mask"].device, text["embeds"].dtype), text])
        visited: list[Tensor] = []
        for index, timestep in enumerate(solver.timesteps):
            visited.append(latents_1X)
            rows = 2 if index < guided else 1
            output = self._pipeline.predict(
                latents_1X.expand(rows, *latents_1X.shape[1:]),
                latents_1X.new_full((rows,), timestep),
                both if index < guided else text,
                latents_1X.new_full((rows,), request.duration),
            )
            if index < guided:
                output = guide(output[:1], output[1:], request.guidance_scale)
            latents_1X = solver.step(output, index, latents_1X, generator)
            tick()
        points = Points(
            latents_SX=torch.cat(visited),
            timesteps_S=latents_1X.new_tensor(solver.timesteps),
            seconds=request.duration,
        )
        return latents_1X, points

    @torch.no_grad()
    def encoded(self, given: ReadClip) -> Tensor:
        """Return the latents [1, X] of a clip, resampled and padded to whole frames."""
        mono_N = given.waveform.mean(0) if given.waveform.ndim == 2 else given.waveform
        resampled_N = resample(mono_N.astype(np.float32), given.sampling_rate, self.rate)
        needed = self._pipeline.latent_samples(given.seconds)
        padded_N = np.pad(resampled_N[:needed], (0, max(0, needed - len(resampled_N))))
        return self._pipeline.encode_audio(torch.from_numpy(padded_N)[None].to(self._pipeline.device))

    @torch.no_grad()
    def noised(self, clean_1X: Tensor, request: GenerationRequest) -> Points:
        """Return clean latents with the noise of `request`'s seed, at the timesteps of its solver."""
        scheduler = cast(Any, self._pipeline).scheduler
        steps = min(request.num_inference_steps, _STEPS_OF_GIVEN)
        timesteps_S = clean_1X.new_tensor(self._pipeline.solver(request.scheduler, steps).timesteps)
        shape = (len(timesteps_S), *clean_1X.shape[1:])
        noise_SX = torch.randn(shape, generator=clip_generator(request.seed)).to(clean_1X)
        clean_SX = clean_1X.expand(shape)
        if hasattr(scheduler, "add_noise"):
            latents_SX = scheduler.add_noise(clean_SX, noise_SX, timesteps_S.long())
        else:  # a straight path, whose timestep is the share of noise
            share_S = (timesteps_S / scheduler.config.num_train_timesteps).view(
                -1, *(1,) * (clean_SX.ndim - 1)
            )
            latents_SX = (1 - share_S) * clean_SX + share_S * noise_SX
        return Points(latents_SX=latents_SX, timesteps_S=timesteps_S, seconds=request.duration)

    def _attribute(
        self, request: ExplanationRequest, points: Points, text: ReadPrompt, tick: Tick
    ) -> tuple[NDArray[np.float32], float | None, int]:
        matrix_WT, iterations = self.matrix(request.method, points, text, request.iterations, tick)
        size = float(matrix_WT.mean()) if request.method == MASK else None
        return matrix_WT.float().cpu().numpy(), size, iterations

    def matrix(
        self, method: str, points: Points, text: ReadPrompt, iterations: int, tick: Tick = lambda: None
    ) -> tuple[Tensor, int]:
        """Return the matrix [W, T] of a method, and its iterations."""
        arguments: Any = (self.denoise, points, text.conditioning, text.owners_WL, tick)
        if method == MASK:
            found = methods.learned_mask(self.denoiser, *arguments, iterations=iterations)
            # A word that was truncated away has no token, so that nothing was learned for it.
            return found.mask_WT * text.owners_WL.any(1, keepdim=True).to(found.mask_WT), found.iterations
        with torch.no_grad():
            if method == ATTENTION:
                return methods.attention(self.denoiser, *arguments), 0
            return methods.occlusion(*arguments), 0

    def _variants(self, request: ExplanationRequest, text: ReadPrompt, tick: Tick) -> tuple[Variant, ...]:
        """Return the clip without words, or with others in their place, from the same noise."""
        generation = request.generation
        if not request.without:
            return ()
        chosen = find_phrase([word.text for word in text.words], request.without)
        if request.replacement:
            prompt = replaced(generation.prompt, [text.words[index] for index in chosen], request)
            conditioning = self._pipeline.encode([prompt], length=self._pipeline.text_length(prompt))
        else:
            prompt = generation.prompt
            masked_1L = text.owners_WL[chosen].any(0, keepdim=True)
            conditioning = methods.without(text.conditioning, masked_1L)
        clean_1X, _ = self.generate(generation, conditioning, tick)
        samples = round(generation.duration * self.rate)
        return (
            Variant(
                kind=REPLACED if request.replacement else WITHOUT,
                words=request.without,
                prompt=prompt,
                clip=self._clip(clean_1X, samples, generation.seed),
            ),
        )

    def decoded(self, clean_1X: Tensor, request: GenerationRequest) -> NDArray[np.float32]:
        """Return the samples [N] of a request's clip."""
        return self._clip(clean_1X, round(request.duration * self.rate), request.seed).waveform()

    def _clip(self, clean_1X: Tensor, samples: int, seed: int) -> Clip:
        waveform_1N = self._pipeline.decode(clean_1X, samples)
        if not bool(torch.isfinite(waveform_1N).all()):
            raise NotFiniteError.of("clip", self._pipeline.description.model.digest)
        return Clip.of_samples(waveform_1N[0].cpu().numpy(), self.rate, seed=seed)

    def _checked(self, matrix_WT: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(matrix_WT).all():
            raise NotFiniteError.of("explanation", self._pipeline.description.model.digest)
        return np.maximum(matrix_WT, 0)

    def _warnings(self, request: ExplanationRequest, text: ReadPrompt) -> tuple[str, ...]:
        """Return sentences on the prompt, its replacement and the clip."""
        found = [f"prompt {one}" for one in self._pipeline.prompt_warnings(request.generation.prompt)]
        if request.replacement:
            found += [f"replacement {one}" for one in self._pipeline.prompt_warnings(request.replacement)]
        unread = [
            word.text for word, owned_L in zip(text.words, text.owners_WL, strict=True) if not owned_L.any()
        ]
        if unread:
            found.append(f"prompt has words whose rows are 0, since the model reads no token of them: "
                         f"{', '.join(unread[:10])}")  # fmt: skip
        return (*found, *(request.given.warnings if request.given is not None else ()))


def replaced(prompt: str, words: Sequence[Word], request: ExplanationRequest) -> str:
    """Return `prompt` with the replacement where the phrase stands, at each place."""
    size = len(find_words(request.without))
    for start in reversed(range(0, len(words), size)):
        first, last = words[start], words[start + size - 1]
        prompt = prompt[: first.start] + request.replacement + prompt[last.end :]
    return prompt


class _Steps:
    """Reports the progress of a request, over all its calls of the denoiser."""

    def __init__(self, request: ExplanationRequest, words: int, report: Report) -> None:
        steps = request.generation.num_inference_steps
        calls = 1 + words // methods.MAX_ROWS
        explains = request.iterations + 1 if request.method == MASK else steps * calls
        if request.given is not None and request.method != MASK:
            explains = min(steps, _STEPS_OF_GIVEN) * calls
        makes = (request.given is None) + bool(request.without)
        self._expected = max(1, explains + steps * makes)
        self._done, self._report = 0, report

    def within(self, stage: str) -> Callable[[], None]:
        """Return the function to call after each step of a stage."""

        def tick() -> None:
            self._done += 1
            # A mask may end early, and never late.
            self._report(ExplanationProgress(stage=stage, fraction=min(1.0, self._done / self._expected)))

        return tick

    def finish(self) -> None:
        """Report that all is done."""
        self._report(ExplanationProgress(stage="finished", fraction=1.0))
