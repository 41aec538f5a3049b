"""`AudioGenExplainer`: explains the clips of an AudioGen by AudioGenX.

Shapes: B rows, K codebooks, S predicted steps, T token frames, L text tokens, W width of the language model,
N samples; words are V.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from services.api.explanation import (
    AUDIOGENX,
    AUDIOGENX_UPSTREAM,
    COUNTERFACTUAL,
    FACTUAL,
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
from services.audio.resampling import resample
from services.audio.words import Word, find_phrase, find_words
from services.errors import NotFiniteError
from services.models.audiogen.audiogenx import (
    ITERATIONS,
    LearnedMask,
    MaskGenerators,
    gumbel_noise,
    learn_mask,
)
from services.models.audiogen.language_model import heads
from services.models.audiogen.masking import masked_attention, masked_states
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.explaining.explainer import replaced
from services.models.explaining.tokens import tokens_of_words
from services.models.latent import clip_generator, guide, guided_steps

Tick = Callable[[], None]
"""Called after each step; may raise to end the request."""

_MASK_STREAM: Final = 1_502_459
"""Index of the random numbers of masks among those of a seed: other than those of clips."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadText:
    """An encoded prompt, and which tokens belong to each of its words."""

    words: tuple[Word, ...]
    text_LW: Tensor
    """Projected tokens, padded as for generation."""
    tokens: int
    """Tokens without padding."""
    owners_VL: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MadeClip:
    """A token sequence, and the states that made it."""

    sequence_KS: Tensor
    """Its input steps and the last one: S + 1 steps."""
    states_SW: Tensor
    """Of the conditional half, after the last norm."""


class AudioGenExplainer:
    """An `Explainer` of an AudioGen in this process."""

    def __init__(self, pipeline: AudioGenPipeline) -> None:
        self._pipeline = pipeline

    @property
    def description(self) -> ExplainerModel:
        """See `Explainer`."""
        return ExplainerModel(
            generation=self._pipeline.description,
            methods=(AUDIOGENX, AUDIOGENX_UPSTREAM),
            frame_seconds=self.frame_seconds,
            iterations=ITERATIONS,
            explains_given=True,
            makes_variants=True,
        )

    @property
    def rate(self) -> int:
        """Sampling rate of the model in hertz."""
        return int(self._pipeline.codec.config.sampling_rate)

    @property
    def frame_seconds(self) -> float:
        """Length of a frame of tokens in seconds."""
        return self._pipeline.hop_length / self.rate

    def explain(self, request: ExplanationRequest, report: Report) -> Explanation:
        """See `Explainer`."""
        start = time.monotonic()
        generation, steps = request.generation, _Steps(request, self._pipeline, report)
        text = self.read(generation.prompt)
        if request.given is None:
            made = self.generate(generation, text, tick=steps.within("denoise"))
            clip = self.clip(made, generation)
        else:
            made = self.given(request, text)
            waveform_N = request.given.waveform
            mono_N = waveform_N.mean(0) if waveform_N.ndim == 2 else waveform_N
            clip = Clip.of_samples(
                np.asarray(mono_N, dtype=np.float32), request.given.sampling_rate, seed=generation.seed
            )
        learned = self.learn(
            made,
            text,
            seed=generation.seed,
            iterations=request.iterations,
            history=request.method == AUDIOGENX,
            tick=steps.within("explain"),
        )
        variants = self._variants(request, text, learned.p_SL, steps.within("variant"))
        matrix_VT = self.by_word(learned.p_SL, text)
        if not bool(torch.isfinite(matrix_VT).all()):
            raise NotFiniteError.of("explanation", self._pipeline.description.model.digest)
        report(ExplanationProgress(stage="finished", fraction=1.0))
        return Explanation(
            prompt=generation.prompt,
            words=tuple(word.text for word in text.words),
            matrix_WT=matrix_VT.cpu().numpy(),
            frame_seconds=self.frame_seconds,
            method=request.method,
            seed=generation.seed,
            model=self._pipeline.description.model,
            warnings=self._warnings(request, text),
            clip=clip,
            variants=variants,
            mask_size=float(learned.p_SL.mean()),
            iterations=request.iterations,
            seconds=time.monotonic() - start,
        )

    # ------------------------------------------------------------------------------------------- parts

    @torch.no_grad()
    def read(self, prompt: str) -> ReadText:
        """Encode a prompt, and find its words."""
        pipeline = self._pipeline
        length = pipeline.text_length(prompt)
        words = tuple(find_words(prompt))
        encoded = pipeline.encode([prompt], length=length)
        return ReadText(
            words=words,
            text_LW=pipeline.projection(encoded["embeds"].to(pipeline.decoder.dtype))[0],
            tokens=int(encoded["mask"].sum()),
            owners_VL=tokens_of_words(pipeline.tokenizer, prompt, words, length),
        )

    @torch.no_grad()
    def generate(
        self,
        request: GenerationRequest,
        text: ReadText,
        *,
        mask_SL: Tensor | None = None,
        tick: Tick = lambda: None,
    ) -> MadeClip:
        """Make the clip of a request, with a mask on what each step reads of the text.

        Args:
            request: duration, guidance, seed and the way of sampling.
            text: the prompt.
            mask_SL: of the tokens without padding; None: ones.
            tick: called after each step.
        """
        pipeline, decoder = self._pipeline, self._pipeline.decoder
        generator, scheduler = clip_generator(request.seed), pipeline.make_scheduler(request.scheduler)
        sequence_1KS = pipeline.noise(request.duration, generator)
        steps = pipeline.steps(0, request.duration)
        texts_BLW = text.text_LW[None]
        masks_BSL = texts_BLW.new_ones((1, steps, len(text.text_LW)))
        if mask_SL is not None:
            masks_BSL[0, :, : text.tokens] = mask_SL
        guided = guided_steps(request.guidance_scale, request.guidance_stop, steps)
        if guided:
            other_LW = self._negative(request.negative_prompt, len(text.text_LW))
            texts_BLW = torch.stack([text.text_LW, other_LW])
            masks_BSL = torch.cat([masks_BSL, torch.ones_like(masks_BSL)])
        rows, states = len(texts_BLW), []
        past = EncoderDecoderCache(DynamicCache(config=decoder.config), DynamicCache(config=decoder.config))
        with masked_attention(decoder):
            for step in range(steps):
                new_BK1 = sequence_1KS[..., step : step + 1].long().expand(rows, -1, -1)
                states_B1W = masked_states(decoder, new_BK1, texts_BLW, masks_BSL[:, step : step + 1], past)
                logits_BKV = heads(decoder, states_B1W)[:, :, 0].float()
                first_1KV, others_BKV = logits_BKV[:1], logits_BKV[1:]
                if step < guided:
                    first_1KV = guide(others_BKV, first_1KV, request.guidance_scale)
                (sequence_1KS,) = scheduler.step(first_1KV, step, sequence_1KS, generator)
                if not bool(torch.isfinite(sequence_1KS).all()):
                    raise NotFiniteError.of("clip", pipeline.description.model.digest)
                states.append(states_B1W[0, 0])
                tick()
        return MadeClip(sequence_KS=sequence_1KS[0].long(), states_SW=torch.stack(states))

    @torch.no_grad()
    def given(self, request: ExplanationRequest, text: ReadText) -> MadeClip:
        """Return the tokens of a given clip, and the states with which the model follows them."""
        assert request.given is not None
        waveform_N = request.given.waveform
        mono_N = waveform_N.mean(0) if waveform_N.ndim == 2 else waveform_N
        resampled_N = resample(mono_N.astype(np.float32), request.given.sampling_rate, self.rate)
        needed = self._pipeline.latent_samples(request.generation.duration)
        padded_N = np.pad(resampled_N[:needed], (0, max(0, needed - len(resampled_N))))
        sequence_1KS = self._pipeline.encode_audio(torch.from_numpy(padded_N)[None]).long()
        ones_1SL = text.text_LW.new_ones((1, sequence_1KS.shape[-1] - 1, len(text.text_LW)))
        with masked_attention(self._pipeline.decoder):
            states_1SW = masked_states(
                self._pipeline.decoder, sequence_1KS[..., :-1], text.text_LW[None], ones_1SL
            )
        return MadeClip(sequence_KS=sequence_1KS[0], states_SW=states_1SW[0])

    def learn(
        self,
        made: MadeClip,
        text: ReadText,
        *,
        seed: int,
        iterations: int = ITERATIONS,
        history: bool = True,
        tick: Tick = lambda: None,
    ) -> LearnedMask:
        """Learn which text tokens, without padding, each step of a clip needs."""
        device, steps = made.states_SW.device, len(made.states_SW)
        generator = clip_generator(seed, _MASK_STREAM)
        generators = MaskGenerators(steps, text.text_LW.shape[1], generator=generator).to(device)
        padding = len(text.text_LW) - text.tokens

        def noise(_: int) -> Tensor:
            return gumbel_noise((steps, text.tokens, 2), generator).to(device)

        return learn_mask(
            self._pipeline.decoder,
            made.sequence_KS[:, :-1],
            text.text_LW[: text.tokens],
            made.states_SW,
            generators=generators,
            noise=noise,
            iterations=iterations,
            history=history,
            padding=padding,
            tick=tick,
        )

    def by_word(self, p_SL: Tensor, text: ReadText) -> Tensor:
        """Return the matrix [V, T] of words and token frames.

        A frame takes the mean of the K steps that predict its codes, a word the mean of its tokens. The end
        token belongs to no word.
        """
        codebooks = self._pipeline.codebooks
        frames = len(p_SL) + 1 - codebooks
        p_TL = torch.stack([p_SL[k : k + frames] for k in range(codebooks)]).mean(0)
        owners_VL = text.owners_VL[:, : text.tokens].to(p_TL)
        matrix_VT: Tensor = owners_VL @ p_TL.T / owners_VL.sum(1, keepdim=True).clamp(min=1)
        return matrix_VT

    def waveform(self, made: MadeClip, duration: float) -> Tensor:
        """Decode a clip's tokens to a waveform [1, N]."""
        return self._pipeline.decode(made.sequence_KS[None].float(), round(duration * self.rate))

    def clip(self, made: MadeClip, request: GenerationRequest) -> Clip:
        """Decode a clip's tokens."""
        waveform_1N = self.waveform(made, request.duration)
        if not bool(torch.isfinite(waveform_1N).all()):
            raise NotFiniteError.of("clip", self._pipeline.description.model.digest)
        return Clip.of_samples(waveform_1N[0].cpu().numpy(), self.rate, seed=request.seed)

    # ------------------------------------------------------------------------------------------ details

    def _negative(self, prompt: str, length: int) -> Tensor:
        """Return the projected negative prompt, padded or cut to `length` tokens; zeros for an empty one."""
        pipeline = self._pipeline
        encoded = pipeline.encode([prompt], length=length)
        negative_LW: Tensor = pipeline.projection(encoded["embeds"].to(pipeline.decoder.dtype))[0]
        return negative_LW

    def _variants(
        self, request: ExplanationRequest, text: ReadText, p_SL: Tensor, tick: Tick
    ) -> tuple[Variant, ...]:
        """Return clips of the same seed: factual, counterfactual, and without words or with others."""
        generation = request.generation
        masks = [(FACTUAL, "", p_SL), (COUNTERFACTUAL, "", 1 - p_SL)]
        chosen = find_phrase([word.text for word in text.words], request.without) if request.without else []
        if chosen and not request.replacement:
            kept_L = ~text.owners_VL[chosen].any(0)[: text.tokens]
            masks.append((WITHOUT, request.without, kept_L.to(p_SL).expand_as(p_SL)))
        variants = [
            Variant(
                kind=kind,
                words=words,
                prompt=generation.prompt,
                clip=self.clip(self.generate(generation, text, mask_SL=mask_SL, tick=tick), generation),
            )
            for kind, words, mask_SL in masks
        ]
        if request.replacement:
            prompt = replaced(generation.prompt, [text.words[index] for index in chosen], request)
            made = self.generate(generation, self.read(prompt), tick=tick)
            clip = self.clip(made, generation)
            variants.append(Variant(kind=REPLACED, words=request.without, prompt=prompt, clip=clip))
        return tuple(variants)

    def _warnings(self, request: ExplanationRequest, text: ReadText) -> tuple[str, ...]:
        """Return sentences on the prompt, its replacement and the clip."""
        found = [f"prompt {one}" for one in self._pipeline.prompt_warnings(request.generation.prompt)]
        if request.replacement:
            found += [f"replacement {one}" for one in self._pipeline.prompt_warnings(request.replacement)]
        return (*found, *(request.given.warnings if request.given is not None else ()))


class _Steps:
    """Reports the progress of a request, over all its steps."""

    def __init__(self, request: ExplanationRequest, pipeline: AudioGenPipeline, report: Report) -> None:
        clips = (request.given is None) + 2 + bool(request.without)
        steps = pipeline.steps(0, request.generation.duration)
        self._expected = clips * steps + request.iterations
        self._done, self._report = 0, report

    def within(self, stage: str) -> Tick:
        """Return the function to call after each step of a stage."""

        def tick() -> None:
            self._done += 1
            self._report(ExplanationProgress(stage=stage, fraction=min(1.0, self._done / self._expected)))

        return tick
