"""Which word of a prompt made which sound: requests, answers, and the ports `Explainer` and `ClipExplainer`.

The wire is ``explanation.proto``. An `Explainer` belongs to a model in this process and runs one request at a
time; a `ClipExplainer` is what commands use, in this process or through a service.

Shapes: W words, T frames of the explanation, N samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from services.api.generation import (
    Clip,
    GenerationModel,
    GenerationOptions,
    GenerationRequest,
    Queued,
    violations,
)
from services.api.model import ModelVersion
from services.api.scoring import Sound
from services.audio.decoding import ReadClip
from services.audio.prompt import prompt_fault
from services.audio.words import find_phrase, find_words
from services.errors import FieldViolation, InvalidInputError

OCCLUSION: Final = "occlusion"
ATTENTION: Final = "attention"
MASK: Final = "mask"
AUDIOGENX: Final = "audiogenx"
AUDIOGENX_UPSTREAM: Final = "audiogenx-upstream"
METHODS: Final = {
    OCCLUSION: "how much the denoiser's output changes without the word",
    ATTENTION: "how much the denoiser attends to the word",
    MASK: "which words a frame needs, learned so that the rest can be left out",
    AUDIOGENX: "which words an audio token needs, learned so that the rest can be left out",
    AUDIOGENX_UPSTREAM: "the same as its authors compute it: no audio token knows the earlier ones",
}
"""Names of the methods, and what their values mean."""

MAX_WORDS: Final = 64
"""Most words of a prompt: each is a row of every call of the denoiser."""
MAX_ITERATIONS: Final = 1000
"""Most iterations of a method that learns."""

WITHOUT: Final = "without"
REPLACED: Final = "replaced"
FACTUAL: Final = "factual"
COUNTERFACTUAL: Final = "counterfactual"
VARIANTS: Final = {
    WITHOUT: "the words masked in the cross-attention, the seed unchanged",
    REPLACED: "other words in their place, the seed unchanged",
    FACTUAL: "only what the explanation keeps",
    COUNTERFACTUAL: "only what the explanation leaves out",
}
"""Kinds of clips that an explanation can be checked by."""


class ExplanationOptions(GenerationOptions, total=False):
    """The keyword arguments of an explanation. None, or left out: the default."""

    method: str | None
    """One of `METHODS`. Default: the model's first."""
    clip: Sound | None
    """Clip to explain, with the prompt that describes it. Default: the clip that the model makes."""
    without: str | None
    """Word, or words that follow each other, to also make the clip without."""
    replacement: str | None
    """Words to take instead of those that `without` names, rather than none."""
    iterations: int | None
    """Most iterations of a method that learns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainerModel:
    """A model that explains, with its limits and the defaults of its options."""

    generation: GenerationModel
    """The generator whose clips are explained."""
    methods: tuple[str, ...]
    """Names of its methods, of `METHODS`; the first is the default."""
    frame_seconds: float
    """Length of a frame of an explanation in seconds."""
    max_words: int = MAX_WORDS
    """Most words of a prompt."""
    iterations: int = 0
    """Default of `iterations`; 0 if no method learns."""
    explains_given: bool = False
    """Whether it also explains a given clip."""
    makes_variants: bool = False
    """Whether it makes clips `without` words."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExplanationRequest:
    """A clip to explain, and how. Complete: every option has a value."""

    generation: GenerationRequest
    """How the clip is made. For a given clip its duration is the clip's, and the seed is that of the noise
    which is added to it."""
    method: str
    """One of `METHODS`."""
    given: ReadClip | None = None
    """The clip; None: the one that is made."""
    without: str = ""
    """Words to also make the clip without; empty: none."""
    replacement: str = ""
    """Words to take instead of them; empty: none."""
    iterations: int = 0
    """Most iterations of a method that learns."""

    @classmethod
    def of(
        cls,
        prompt: str,
        model: ExplainerModel,
        *,
        given: ReadClip | None = None,
        method: str | None = None,
        without: str | None = None,
        replacement: str | None = None,
        iterations: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Self:
        """Return the complete request; see `validate_explanation`."""
        if given is not None:
            options["duration"] = given.seconds
        return cls(
            generation=GenerationRequest.of(prompt, model.generation.defaults, **options),
            method=method or model.methods[0],
            given=given,
            without=without or "",
            replacement=replacement or "",
            iterations=iterations or model.iterations,
        )


def explanation_violations(request: ExplanationRequest, model: ExplainerModel) -> tuple[FieldViolation, ...]:
    """Return every violated field of `request`; empty if there is none."""
    found = list(violations(request.generation, model.generation.limits))
    if request.given is not None:
        # The duration is the clip's.
        found = [
            FieldViolation("clip", f"lasts {one.description.removeprefix('is ')}; cut it")
            if one.field == "duration"
            else one
            for one in found
        ]

    def refuse(field: str, text: str) -> None:
        found.append(FieldViolation(field, text))

    words = [word.text for word in find_words(request.generation.prompt)]
    named = {violation.field for violation in found}
    if "prompt" not in named and not words:
        refuse("prompt", "has no words; describe the sound, for example 'A dog barks then a siren wails'")
    if len(words) > model.max_words:
        refuse("prompt", f"has {len(words)} words, must have at most {model.max_words}; shorten it")
    if request.generation.clip_count != 1 and "clip_count" not in named:
        refuse("clip_count", f"is {request.generation.clip_count}; one clip is explained at a time, give 1")
    if request.method not in model.methods:
        known = ", ".join(model.methods)
        refuse("method", f"is {request.method[:40]!r}, which this model does not have; give one of {known}")
    if request.given is not None and not model.explains_given:
        refuse("clip", "is given, but this model explains only clips that it makes; leave it out")
    if not (request.iterations == model.iterations or 1 <= request.iterations <= MAX_ITERATIONS):
        refuse("iterations", f"is {request.iterations}, must be between 1 and {MAX_ITERATIONS}")
    if request.without:
        if request.given is not None:
            refuse("without", "needs a clip that the model makes; leave out the clip, or without")
        elif not model.makes_variants:
            refuse("without", "is given, but this model can't leave out single words; leave it out")
        elif words and not find_phrase(words, request.without):
            # Not cut: a list of words that lacks the last ones would be wrong.
            there = ", ".join(dict.fromkeys(words))
            refuse(
                "without", f"is {request.without[:80]!r}, which is not in the prompt; its words are {there}"
            )
    fault = prompt_fault(
        request.replacement, model.generation.limits.max_prompt_characters, may_be_blank=True
    )
    if fault is not None:
        refuse("replacement", fault)
    elif request.replacement and not request.without:
        refuse("replacement", "is given without the words that it replaces; give them as without")
    return tuple(found)


def validate_explanation(request: ExplanationRequest, model: ExplainerModel) -> None:
    """Raise `InvalidInputError` with every violation at once, if there is any."""
    found = explanation_violations(request, model)
    if found:
        raise InvalidInputError(*found)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplanationProgress:
    """One step of a request is done."""

    stage: str
    """What is done now: ``denoise``, ``explain``, ``decode`` and others."""
    fraction: float
    """Share of all steps that are done, 0 to 1."""


ExplanationUpdate = Queued | ExplanationProgress
"""What is reported of a request before its answer."""

Report = Callable[[ExplanationProgress], None]
"""Called after each step. It raises what ends the request: `RequestCancelledError` of a cancelled one."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Variant:
    """A clip that an explanation can be checked by."""

    kind: str
    """One of `VARIANTS`."""
    words: str
    """The words that were left out or replaced; empty for others."""
    prompt: str
    """The prompt that it was made of."""
    clip: Clip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Explanation:
    """How much each frame of a clip owes to each word of its prompt."""

    prompt: str
    words: tuple[str, ...]
    """Words of the prompt, in order."""
    matrix_WT: NDArray[np.float32]
    """[W, T], at least 0. What its values mean depends on the method (`METHODS`); only values of one
    explanation compare."""
    frame_seconds: float
    """Length of a frame in seconds."""
    method: str
    """One of `METHODS`."""
    seed: int
    """Seed of the clip, or of the noise that was added to a given one."""
    model: ModelVersion
    """The model whose use of the words is explained."""
    warnings: tuple[str, ...] = ()
    """Sentences that begin with the field: ``prompt has words …``."""
    clip: Clip
    """The explained clip."""
    variants: tuple[Variant, ...] = ()
    mask_size: float | None = None
    """Mean of the learned mask, 0 to 1; None for methods that learn none."""
    iterations: int = 0
    """Iterations of a method that learns."""
    seconds: float = 0.0
    """Time that it took, the clip and its variants included."""

    def peaks(self) -> tuple[float, ...]:
        """Return for each word the second of the middle of its largest frame."""
        return tuple((int(row_T.argmax()) + 0.5) * self.frame_seconds for row_T in self.matrix_WT)


def as_requested(explanation: Explanation, request: ExplanationRequest) -> Explanation:
    """Return an explainer's answer with its clips as the request wants them. Takes milliseconds.

    A given clip keeps its sampling rate and loudness.
    """
    generation, clip = request.generation, explanation.clip
    return replace(
        explanation,
        clip=clip.as_requested(generation)
        if request.given is None
        else clip.encoded(generation.encoding, clip.sampling_rate),
        variants=tuple(replace(one, clip=one.clip.as_requested(generation)) for one in explanation.variants),
    )


def work_of(request: ExplanationRequest) -> float:
    """Return the work units of a request for quotas: those of a generation of its clips, and of its words.

    Seconds of the clip × (denoising steps × (clips that are made + words) + iterations).
    """
    generation = request.generation
    made = (request.given is None) + bool(request.without)
    rows = generation.num_inference_steps * (made + len(find_words(generation.prompt)))
    return generation.duration * (rows + request.iterations)


class Explainer(Protocol):
    """Explains the clips of one model in this process. Not thread-safe: one request at a time."""

    @property
    def description(self) -> ExplainerModel:
        """Its methods, limits and defaults. The caller fills in the model's version."""

    def explain(self, request: ExplanationRequest, report: Report) -> Explanation:
        """Return the explanation of a request that `validate_explanation` accepts; blocks for seconds.

        `report` is called after each step of the model, at most one call of it apart, so that what it raises
        frees the device within one step. The model is as before, whatever happens. The clips have the model's
        sampling rate, ``float32``; `Explanation.model` is filled in by the caller.
        """
        ...


class ClipExplainer(Protocol):
    """Explains clips: `AudioClient` through a service, `services.local_explainer.LocalExplainer` here.

    Thread-safe. All methods raise the tree of `services.errors`.
    """

    def explain_audio(
        self,
        prompt: str,
        *,
        on_update: Callable[[ExplanationUpdate], None] | None = None,
        **options: Unpack[ExplanationOptions],
    ) -> Explanation:
        """Return the explanation of a clip; `on_update` is called with each update."""
        ...

    def close(self) -> None:
        """Free all resources; calls in progress are cancelled."""
        ...
