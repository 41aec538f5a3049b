"""A captioner, and the CLAP model that chooses among its candidates: from sound to sentences.

Shapes: B clips, W windows, S samples of a window, D embedding width.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.api.captioning import (
    CaptionCandidate,
    CaptionDefaults,
    CaptionRequest,
    Captions,
    CaptionTimings,
    compose,
)
from services.api.model import ModelVersion
from services.api.scoring import Scorer
from services.audio.decoding import AudioBounds, ReadClip
from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault
from services.audio.resampling import resample
from services.errors import NotFiniteError
from services.models.captioner.model import CaptionClip, Captioner
from services.models.clap.model import EmbeddingModel
from services.weights.uri import ResolvedModel

MAX_SECONDS: Final = 30.0
"""Longest clip: as long as Clotho's."""

SENT_RATE: Final = 48_000
"""Highest sampling rate, in hertz, of sound that is sent to a scoring service; CLAP models read no higher."""


def bounds_of(max_batch_size: int) -> AudioBounds:
    """Return the limits of a call."""
    return AudioBounds(max_batch_size=max_batch_size, max_seconds=MAX_SECONDS, may_be_silent=False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedClip:
    """A clip as the models take it."""

    clip: CaptionClip
    windows_WS: Tensor | None
    """For the CLAP model that refines in this process."""
    sound: tuple[NDArray[np.float32], int] | None
    """Samples and their rate in hertz, for a scoring service that refines."""
    seconds: float
    """Length of the clip."""
    warnings: tuple[str, ...]
    """See `ReadClip.warnings`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CaptionJob:
    """A clip to describe, and how."""

    prepared: PreparedClip
    request: CaptionRequest


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchTimes:
    """Time of one batch by stage, in seconds."""

    encode: float
    generate: float
    refine: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draft:
    """The candidates of one clip."""

    candidates: tuple[CaptionCandidate, ...]
    """In the order of the request's beams."""
    times: BatchTimes
    """Of the batch that the clip was in."""


Drafts = list[tuple[CaptionCandidate, ...]]
"""The candidates of each clip."""


class CaptionModel:
    """A captioner with the CLAP model that refines, if any. Not thread-safe, except `prepare`."""

    def __init__(
        self,
        captioner: Captioner,
        version: ModelVersion,
        *,
        clap: EmbeddingModel | None = None,
        scorer: Scorer | None = None,
        sends: bool = False,
    ) -> None:
        """Args:
        captioner: the model.
        version: its identity.
        clap: the CLAP model that refines in this process.
        scorer: its identity.
        sends: whether a scoring service refines, so that clips keep their sound.
        """
        self.version, self.scorer = version, scorer
        self._captioner, self._clap, self._sends = captioner, clap, sends
        self.stage_seconds = {"encode": 0.0, "generate": 0.0, "refine": 0.0}
        """Time of all batches by stage."""

    @property
    def defaults(self) -> CaptionDefaults:
        """Defaults of the options of a call."""
        config = self._captioner.config
        return CaptionDefaults(
            beams=config.beams,
            max_new_tokens=config.max_new_tokens,
            can_refine=self._clap is not None or self._sends,
        )

    @property
    def sampling_rate(self) -> int:
        """Sampling rate in hertz that clips are resampled to."""
        return self._captioner.sampling_rate

    @property
    def max_seconds(self) -> float:
        """Length of a clip that the captioner reads, in seconds."""
        return self._captioner.max_seconds

    def cost(self, seconds: float, request: CaptionRequest) -> float:
        """Return the seconds that a clip counts with in batches and queues: in proportion to its beams."""
        return min(seconds, self.max_seconds) * request.total_beams / sum(self._captioner.config.beams)

    def kept_bytes(self, seconds: float, request: CaptionRequest) -> int:
        """Return the size of a prepared clip of this length, at most."""
        kept = math.ceil(4 * min(seconds, self.max_seconds) * self.sampling_rate)
        if request.refine and self._clap is not None:
            windows = max(1, math.ceil(seconds * self._clap.sampling_rate / self._clap.window_samples))
            kept += 4 * windows * self._clap.window_samples
        elif request.refine:
            kept += math.ceil(4 * seconds * SENT_RATE)
        return kept

    def prepare(self, clip: ReadClip, request: CaptionRequest) -> PreparedClip:
        """Return a clip for `describe`. Thread-safe; blocks for milliseconds."""
        prepared = self._captioner.prepare(clip.waveform, clip.sampling_rate)
        windows, sound = None, None
        if request.refine and self._clap is not None:
            windows = self._clap.prepare(clip.waveform, clip.sampling_rate)
        elif request.refine:
            rate = min(clip.sampling_rate, SENT_RATE)
            sound = (resample(clip.waveform, clip.sampling_rate, rate), rate)
        return PreparedClip(
            clip=prepared,
            windows_WS=windows,
            sound=sound,
            seconds=clip.seconds,
            warnings=(*clip.warnings, *prepared.warnings),
        )

    def describe(self, jobs: Sequence[CaptionJob]) -> list[Draft]:
        """Return the candidates of each clip. All are encoded at once; those of equal options are searched at
        once.
        """
        start = time.monotonic()
        tokens = self._captioner.encode([job.prepared.clip for job in jobs])
        encoded = time.monotonic()
        found: dict[int, tuple[CaptionCandidate, ...]] = {}
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault((job.request.beams, job.request.max_new_tokens), []).append(index)
        for (beams, max_new_tokens), members in groups.items():
            written = self._captioner.generate(tokens[members], beams, max_new_tokens)
            for index, candidates in zip(members, written, strict=True):
                found[index] = tuple(
                    CaptionCandidate(text=one.text, beams=one.beams, log_probability=one.log_probability)
                    for one in candidates
                )
        generated = time.monotonic()
        self._score(jobs, found)
        times = BatchTimes(
            encode=encoded - start, generate=generated - encoded, refine=time.monotonic() - generated
        )
        for stage in self.stage_seconds:
            self.stage_seconds[stage] += getattr(times, stage)
        return [Draft(candidates=found[index], times=times) for index in range(len(jobs))]

    def _score(self, jobs: Sequence[CaptionJob], found: dict[int, tuple[CaptionCandidate, ...]]) -> None:
        """Replace the candidates of clips that have windows by scored ones."""
        clips = {
            index: windows
            for index, job in enumerate(jobs)
            if (windows := job.prepared.windows_WS) is not None
        }
        texts = scorable_texts([found[index] for index in clips])
        if self._clap is None or not texts:
            return
        audio_BD = self._clap.embed_windows(list(clips.values())).numpy()
        text_BD = self._clap.embed_text(texts).numpy()
        embeddings = dict(zip(texts, text_BD, strict=True))
        for index, audio_D in zip(clips, audio_BD, strict=True):
            found[index] = with_scores(found[index], audio_D, embeddings)


def scorable_texts(drafts: Sequence[Sequence[CaptionCandidate]]) -> list[str]:
    """Return the distinct sentences of candidates that are valid prompts: a model may write others."""
    texts = dict.fromkeys(one.text for draft in drafts for one in draft)
    return [text for text in texts if prompt_fault(text, MAX_PROMPT_CHARACTERS) is None]


def with_scores(
    candidates: Sequence[CaptionCandidate],
    audio_D: NDArray[np.float32],
    embeddings: Mapping[str, NDArray[np.float32]],
) -> tuple[CaptionCandidate, ...]:
    """Return candidates with their CLAP scores, if their sentences have embeddings [D]."""
    return tuple(
        replace(one, clap_score=float(np.clip(embeddings[one.text] @ audio_D, -1.0, 1.0)))
        if one.text in embeddings
        else one
        for one in candidates
    )


def complete(
    model: CaptionModel,
    request: CaptionRequest,
    clips: Sequence[PreparedClip],
    drafts: Sequence[Draft],
    refined: tuple[Drafts, Scorer | None],
    *,
    prepare: float,
    refine: float,
    total: float,
) -> Captions:
    """Return the answer of one call.

    Args:
        model: the models.
        request: options of the call.
        clips: its clips.
        drafts: what `describe` returned for them.
        refined: their candidates after refinement, and the scorer.
        prepare: seconds of decoding and preparing.
        refine: seconds of refinement after `describe`.
        total: seconds of the call.

    Raises:
        NotFiniteError: a number of a candidate is not finite. Other callers get theirs.
    """
    candidates, scorer = refined
    for index, of_clip in enumerate(candidates):
        if not all(math.isfinite(n) for one in of_clip for n in (one.log_probability, one.clap_score or 0.0)):
            raise NotFiniteError.of(f"score of a candidate of clip {index}", model.version.digest)
    captions = [
        compose(of_clip, request, clip.warnings) for of_clip, clip in zip(candidates, clips, strict=True)
    ]
    # The clips of a call may have been in several batches.
    batches = list(dict.fromkeys(draft.times for draft in drafts))
    timings = CaptionTimings(
        prepare=prepare,
        encode=sum(one.encode for one in batches),
        generate=sum(one.generate for one in batches),
        refine=refine + sum(one.refine for one in batches),
        total=total,
    )
    return Captions(captions=tuple(captions), model=model.version, scorer=scorer, timings=timings)


def scorer_of(clap: EmbeddingModel, model: ResolvedModel, name: str) -> Scorer:
    """Return the description of a CLAP model in this process."""
    return Scorer(name=name, model=model.identity, dimension=clap.dimension, sampling_rate=clap.sampling_rate)
