"""Captions of clips: options, answers, and the port `ClipCaptioner`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self, TypedDict, Unpack

from services.api.model import ModelVersion
from services.api.scoring import Scorer, Sound
from services.errors import FieldViolation, InvalidInputError

PLAIN_BEAMS: Final = (4,)
"""Default numbers of beams without CLAP-Refine, as in SLAM-AAC's inference scripts."""
MAX_BEAMS: Final = 16
"""Maximum of each number of beams: more find hardly better sentences."""
MAX_TOTAL_BEAMS: Final = 64
"""Maximum of the sum of all numbers of beams, which bounds the memory that one clip needs."""


class CaptionOptions(TypedDict, total=False):
    """The keyword arguments of captioning. None, or left out: the default."""

    beams: Sequence[int] | None
    """Numbers of beams, each of which gives one candidate. Default: the model's, or `PLAIN_BEAMS`."""
    refine: bool | None
    """Whether CLAP chooses among the candidates. Default: yes, if there is a scorer."""
    max_new_tokens: int | None
    """Maximum number of tokens of a candidate. Default, also for 0: the model's, which is the most."""
    max_candidates: int | None
    """Maximum number of candidates in each answer, the best first. Default, also for 0: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionDefaults:
    """What a captioner can do, and values of the options that a call leaves out."""

    beams: tuple[int, ...]
    """Numbers of beams with CLAP-Refine; without it `PLAIN_BEAMS`."""
    max_new_tokens: int
    """Default of `max_new_tokens`, and its maximum."""
    can_refine: bool
    """Whether there is a scorer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionRequest:
    """How to describe the clips of a call. Complete: every option has a value."""

    beams: tuple[int, ...]
    refine: bool
    max_new_tokens: int
    max_candidates: int
    """0: all."""

    @classmethod
    def of(cls, defaults: CaptionDefaults, **options: Unpack[CaptionOptions]) -> Self:
        """Return the complete request. Raises `InvalidInputError`, which lists every violation."""
        refine = options.get("refine")
        refines = defaults.can_refine if refine is None else refine
        request = cls(
            beams=tuple(options.get("beams") or (defaults.beams if refines else PLAIN_BEAMS)),
            refine=refines,
            max_new_tokens=options.get("max_new_tokens") or defaults.max_new_tokens,
            max_candidates=options.get("max_candidates") or 0,
        )
        faults = tuple(_violations(request, defaults))
        if faults:
            raise InvalidInputError(*faults)
        return request

    @property
    def total_beams(self) -> int:
        """Sum of all numbers of beams: the rows that a clip takes in the language model."""
        return sum(self.beams)


def _violations(request: CaptionRequest, defaults: CaptionDefaults) -> Iterator[FieldViolation]:
    limits = f"must be between 1 and {MAX_BEAMS}"
    for index, beams in enumerate(request.beams):
        if not 1 <= beams <= MAX_BEAMS:
            yield FieldViolation(f"beams[{index}]", f"is {beams}, {limits}")
        elif (first := request.beams.index(beams)) < index:
            text = f"is {beams}, the same as beams[{first}]; give each number once"
            yield FieldViolation(f"beams[{index}]", text)
    if all(1 <= beams <= MAX_BEAMS for beams in request.beams) and request.total_beams > MAX_TOTAL_BEAMS:
        text = f"are {request.total_beams} in all, must be at most {MAX_TOTAL_BEAMS}; give fewer or smaller"
        yield FieldViolation("beams", text)
    if request.refine and not defaults.can_refine:
        yield FieldViolation(
            "refine",
            "is true, but no CLAP model is configured that could choose; leave it out, or configure clap or "
            "scoring",
        )
    if not 1 <= request.max_new_tokens <= defaults.max_new_tokens:
        text = f"is {request.max_new_tokens}, must be between 1 and {defaults.max_new_tokens}"
        yield FieldViolation("max_new_tokens", text)
    if request.max_candidates < 0:
        yield FieldViolation("max_candidates", f"is {request.max_candidates}, must be 0 (all) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionCandidate:
    """A sentence that the language model proposes for a clip."""

    text: str
    beams: int
    """Number of beams of the search that found it."""
    log_probability: float
    """Natural logarithm of its probability by the language model."""
    clap_score: float | None = None
    """Its CLAP score with the clip; None if the call is not refined, or the sentence can't be scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """The description of one clip."""

    text: str
    candidates: tuple[CaptionCandidate, ...]
    """The best first, of which the first is the caption."""
    warnings: tuple[str, ...] = ()
    """Sentences on the clip that begin with ``clip``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTimings:
    """Time of a call by stage, in seconds. A batch's time counts for each call in it."""

    prepare: float
    """Decoding the clips and computing their spectrograms."""
    encode: float
    """Audio encoder and projector."""
    generate: float
    """Beam search of the language model."""
    refine: float
    """CLAP-Refine."""
    total: float
    """From the arrival of the call to its answer; what is not in the other stages is mostly waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """Captions of clips, in order."""

    captions: tuple[Caption, ...]
    model: ModelVersion
    """The captioner."""
    scorer: Scorer | None
    """The scorer that chose among the candidates; None if none did."""
    timings: CaptionTimings


def rank_candidates(candidates: Iterable[CaptionCandidate]) -> tuple[CaptionCandidate, ...]:
    """Return candidates, the best first: by CLAP score, those without one last, then by probability.

    Equal ones stay in order.
    """

    def key(one: CaptionCandidate) -> tuple[bool, float, float]:
        return one.clap_score is None, -(one.clap_score or 0.0), -one.log_probability

    return tuple(sorted(candidates, key=key))


def compose(
    candidates: Iterable[CaptionCandidate], request: CaptionRequest, warnings: Sequence[str]
) -> Caption:
    """Return the caption of a clip: the best of its candidates, of which there is at least one."""
    ranked = rank_candidates(candidates)
    found = list(warnings)
    if request.refine and ranked[0].clap_score is None:
        found.append("clip has no candidate that CLAP can score: the most probable one was taken")
    return Caption(
        text=ranked[0].text, candidates=ranked[: request.max_candidates or None], warnings=tuple(found)
    )


class ClipCaptioner(Protocol):
    """Describes clips: `AudioClient` through a service, `services.local_captioner.LocalCaptioner` here.

    Thread-safe. All methods raise the tree of `services.errors`.
    """

    def caption_audio(self, clips: Sequence[Sound], **options: Unpack[CaptionOptions]) -> Captions:
        """Return the caption of each clip."""
        ...

    def close(self) -> None:
        """Free all resources; calls in progress are cancelled."""
        ...
