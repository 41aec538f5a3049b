"""Best of n, generation composed with a judge: the pure part. The calls are in `services.client.rpcs`."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from services.client.answers import Best, Clip, Generation, JudgedClip, ModelVersion, RankBy, Timings
from services.errors import FieldViolation, InvalidInputError, MilongaError


def check_arguments(candidates: int, rank_by: str, clip_count: int | None) -> None:
    """Refuse what makes no sense before anything is generated.

    Raises:
        InvalidInputError: with every fault.
    """
    faults = []
    if candidates < 1:
        faults.append(FieldViolation("candidates", f"is {candidates!r}, must be at least 1"))
    if rank_by not in get_args(RankBy):
        faults.append(
            FieldViolation("rank_by", f"is {rank_by!r}, must be one of {', '.join(get_args(RankBy))}")
        )
    if clip_count is not None:
        faults.append(
            FieldViolation("clip_count", f"is {clip_count}, which candidates says already; leave it out")
        )
    if faults:
        raise InvalidInputError(*faults)


def portions(count: int, most: int) -> list[int]:
    """Split `count` into parts of at most `most`, the largest first; 0 means that there is no limit."""
    most = most or count
    return [min(most, count - start) for start in range(0, count, most)]


def next_seed(used: Sequence[int]) -> int:
    """Return the seed of the next call, a function of those used so far.

    Not the first one plus one: neighbouring seeds of the caller's would then share candidates. Below 2**32 as
    the seeds are that services draw, and none of `used`, so that all candidates differ.
    """
    attempt = 0
    while True:
        words = f"milonga candidates {used[0]} {len(used)} {attempt}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
        if seed not in used:
            return seed
        attempt += 1


def merge(generations: Sequence[Generation]) -> Generation:
    """Return what several calls made as if it were one answer.

    Raises:
        MilongaError: they were made by different weights.
    """
    first = generations[0]
    return Generation(
        clips=tuple(clip for generation in generations for clip in generation.clips),
        seed=first.seed,
        model=same([generation.model for generation in generations]),
        warnings=tuple(dict.fromkeys(text for generation in generations for text in generation.warnings)),
        timings=Timings(**_added([generation.timings for generation in generations])),
    )


def same(answers: Sequence[Any]) -> Any:
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


def sort(
    generation: Generation, values: Sequence[float], rank_by: RankBy, judges: tuple[ModelVersion, ...]
) -> Best:
    """Put the clips in the order of their values, highest first; equal ones stay as they are."""
    judged = [
        JudgedClip(clip=clip, value=value) for clip, value in zip(generation.clips, values, strict=True)
    ]
    judged.sort(key=lambda candidate: -candidate.value)
    return Best(clips=tuple(judged), generation=generation, rank_by=rank_by, judges=judges)


def batches(clips: Sequence[Clip], most: int) -> list[Sequence[Clip]]:
    """Split clips into parts of at most `most`; 0 means that there is no limit."""
    sizes = portions(len(clips), most)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [clips[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _added(timings: Sequence[Timings]) -> dict[str, float]:
    return {field.name: sum(getattr(timing, field.name) for timing in timings) for field in fields(Timings)}
