"""Best of n: make several clips of a prompt, score them, put them in order.

Written once, as a coroutine over whatever generates and scores. Where neither waits for an event loop, `run`
runs it without one.
"""

import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from services.api.generation import Clip, Generation, GenerationOptions, Timings
from services.api.model import ModelVersion
from services.api.scoring import Rewards, Scores, merge_warnings
from services.errors import FieldViolation, InvalidInputError, MilongaError, invalid, shown_value

RankBy = Literal["reward", "clap"]
"""Value that ranks clips: the reward, or the mean of the scorers' CLAP scores."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A clip and its value."""

    clip: Clip
    number: int
    """Number from 1, in the order in which the candidates were made."""
    value: float
    """The reward (its logit), or the mean CLAP score."""
    details: Mapping[str, float]
    """`probability` of the reward, or the CLAP score by scorer."""
    warnings: tuple[str, ...] = ()
    """The scorers' warnings on the clip and the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """Candidates of one prompt, best first; equal ones stay in the order in which they were made."""

    candidates: tuple[Candidate, ...]
    generation: Generation
    """Their generation: clips in order, the first call's seed, timings summed over the calls."""
    rank_by: RankBy
    scorers: tuple[ModelVersion, ...]
    """The reward model, or the CLAP models."""

    @property
    def clips(self) -> tuple[Clip, ...]:
        """The candidates' clips, best first."""
        return tuple(candidate.clip for candidate in self.candidates)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The generation's warnings, and the scorers', which name the candidates unless they are on all."""
        ordered = sorted(self.candidates, key=lambda candidate: candidate.number)
        found = merge_warnings({f"candidate {one.number}": one.warnings for one in ordered})
        return tuple(dict.fromkeys((*self.generation.warnings, *found)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredClips:
    """Values of some clips, in their order."""

    values: Sequence[float]
    details: Sequence[Mapping[str, float]]
    warnings: Sequence[tuple[str, ...]]
    scorers: tuple[ModelVersion, ...]

    @classmethod
    def by_reward(cls, rewards: Rewards) -> "ScoredClips":
        """Return the logits of rewards. Raises `InvalidInputError` if the model can't read the prompt."""
        _check_readable(all(reward.readable for reward in rewards.rewards), "reward model")
        return cls(
            values=[reward.logit for reward in rewards.rewards],
            details=[{"probability": reward.probability} for reward in rewards.rewards],
            warnings=[reward.warnings for reward in rewards.rewards],
            scorers=(rewards.model,),
        )

    @classmethod
    def by_clap(cls, scores: Scores) -> "ScoredClips":
        """Return the mean of each clip's CLAP scores, by the scorers that can read the prompt.

        Raises `InvalidInputError` if none can.
        """
        names = [scorer.name for scorer in scores.scorers]
        _check_readable(bool(scores.readable.any(axis=1).all()), "scorers")
        return cls(
            values=scores.values.mean(axis=1, where=scores.readable).tolist(),
            details=[dict(zip(names, values_S.tolist(), strict=True)) for values_S in scores.values],
            warnings=scores.warnings,
            scorers=tuple(scorer.model for scorer in scores.scorers),
        )


def _check_readable(readable: bool, model: str) -> None:
    if not readable:
        fault = f"has no word for a sound that the {model} know{'s' if model == 'reward model' else ''}, so "
        raise invalid(
            "prompt", fault + "candidates can't be put in order; use other words, or rank by another"
        )


def check_arguments(candidates: int, rank_by: str, clip_count: int | None) -> None:
    """Raise `InvalidInputError` with every wrong argument, before anything is generated."""
    faults = []
    if candidates < 1:
        faults.append(FieldViolation("candidates", f"is {candidates!r}, must be at least 1"))
    if rank_by not in get_args(RankBy):
        faults.append(
            FieldViolation(
                "rank_by", f"is {shown_value(rank_by)}, must be one of {', '.join(get_args(RankBy))}"
            )
        )
    if clip_count is not None:
        faults.append(
            FieldViolation("clip_count", f"is {clip_count}, which candidates says already; leave it out")
        )
    if faults:
        raise InvalidInputError(*faults)


async def generate_candidates(
    count: int,
    most: int,
    options: GenerationOptions,
    generate: Callable[[GenerationOptions], Awaitable[Generation]],
) -> Generation:
    """Make `count` clips by as few calls of at most `most` clips as that takes (0: no limit).

    The first call's seed is that of `options`, or drawn; those of further calls follow from it (`next_seed`).
    """
    generations: list[Generation] = []
    for portion in portions(count, most):
        part: GenerationOptions = {**options, "clip_count": portion}
        if generations:
            part["seed"] = next_seed([generation.seed for generation in generations])
        generations.append(await generate(part))
    return merge(generations)


async def rank(
    generation: Generation,
    rank_by: RankBy,
    most: int,
    score: Callable[[Sequence[Clip]], Awaitable[ScoredClips]],
) -> Best:
    """Score the clips of `generation`, at most `most` a call (0: no limit), and put the best first.

    Raises:
        MilongaError: the weights that score changed between two calls.
    """
    scored: list[ScoredClips] = []
    start = 0
    for size in portions(len(generation.clips), most):
        scored.append(await score(generation.clips[start : start + size]))
        start += size
    values = [value for part in scored for value in part.values]
    details = [detail for part in scored for detail in part.details]
    warnings = [found for part in scored for found in part.warnings]
    candidates = [
        Candidate(clip=clip, number=number, value=value, details=detail, warnings=found)
        for number, (clip, value, detail, found) in enumerate(
            zip(generation.clips, values, details, warnings, strict=True), start=1
        )
    ]
    # Sorting is stable: equal candidates stay in the order in which they were made.
    candidates.sort(key=lambda candidate: -candidate.value)
    return Best(
        candidates=tuple(candidates),
        generation=generation,
        rank_by=rank_by,
        scorers=same([part.scorers for part in scored]),
    )


def portions(count: int, most: int) -> list[int]:
    """Split `count` into parts of at most `most`, the largest first; 0 means that there is no limit."""
    most = most or count
    return [min(most, count - start) for start in range(0, count, most)]


def next_seed(used: Sequence[int]) -> int:
    """Return the seed of the next call, a function of those used so far.

    Not the first one plus one: neighbouring seeds would then share candidates. Below 2**32 as the seeds that
    are drawn, and none of `used`, so that all candidates differ.
    """
    attempt = 0
    while True:
        words = f"milonga candidates {used[0]} {len(used)} {attempt}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
        if seed not in used:
            return seed
        attempt += 1


def merge(generations: Sequence[Generation]) -> Generation:
    """Return what several calls made as one generation.

    Raises:
        MilongaError: they were made by different weights.
    """
    first = generations[0]
    return Generation(
        clips=tuple(clip for generation in generations for clip in generation.clips),
        seed=first.seed,
        model=same([generation.model for generation in generations]),
        warnings=tuple(dict.fromkeys(text for generation in generations for text in generation.warnings)),
        timings=_sum([generation.timings for generation in generations]),
    )


def same(answers: Sequence[T]) -> T:
    """Return the one value that all calls answered.

    Raises:
        MilongaError: they differ: the service changed its weights in between.
    """
    if any(answer != answers[0] for answer in answers):
        raise MilongaError(
            f"the service changed its weights between two calls, from {answers[0]} to {answers[-1]}, so that "
            "candidates can't be compared; call again"
        )
    return answers[0]


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits for an event loop, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine that must not wait waited for an event loop")


def _sum(timings: Sequence[Timings]) -> Timings:
    return Timings(
        **{one.name: sum(getattr(timing, one.name) for timing in timings) for one in fields(Timings)}
    )
