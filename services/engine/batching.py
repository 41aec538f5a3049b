"""Who runs next, and in which shape: the engine's decisions as pure functions.

A *row* is one sample of a denoiser call. A clip takes two rows with guidance (unconditional, conditional), or
one without. Rows never mix in the denoiser, so companions change no bit; only the number of rows may.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

GUIDED_ROWS = 2
UNGUIDED_ROWS = 1


def rows_of(guidance_scale: float) -> int:
    """Rows that a clip takes in a denoiser call. Guidance up to 1 is none, as everywhere in diffusers."""
    return GUIDED_ROWS if guidance_scale > 1 else UNGUIDED_ROWS


def row_shapes(batch_shapes: Iterable[int]) -> tuple[int, ...]:
    """Return the ascending row counts that calls are padded to, for batch shapes counted in clips.

    Each shape gives itself (no clip guided) and its double (all guided): (1, 2, 4, 8) gives 1, 2, 4, 8, 16.
    """
    shapes = tuple(batch_shapes)
    return tuple(sorted({rows * shape for shape in shapes for rows in (UNGUIDED_ROWS, GUIDED_ROWS)}))


def choose_rows(rows: int, shapes: Sequence[int], *, exact: bool) -> int:
    """Return the row count to pad `rows` rows to: the smallest that fits, or with `exact` the largest."""
    assert 0 < rows <= shapes[-1]
    return shapes[-1] if exact else next(shape for shape in shapes if shape >= rows)


def next_turn(work: Mapping[Key, float]) -> Key:
    """Return the group whose clips have had the least work so far; among equals the one that came first.

    `work` maps a group to the latent frames that each of its clips was given. Charging a turn with the
    length, not with the number of clips, gives every *clip* an equal share of the device: a short draft takes
    several steps for each step of a long render, and a crowded group is not held back for being crowded.
    """
    return min(work, key=lambda key: work[key])


def entry_work(work: Iterable[float]) -> float:
    """Work that a group starts with when it (re)appears: the least of those present.

    From 0 it would hold the device until it had caught up with all that the others did before it came.
    """
    return min(work, default=0.0)


def queue_tag(now: float, clip_index: int) -> float:
    """Return the place in the queue of a request's clip, when the last clip to be started had the tag `now`.

    Start-time fair queueing (Goyal et al., 1996) with equal weights: a request's second clip queues behind
    the first clips of all requests that are already waiting, and nobody waits forever: `now` only grows.
    """
    return now + clip_index


def decodes_this_turn(backlog: int, *, stepping: bool) -> int:
    """Return how many finished clips to decode before the next denoiser call.

    All of them when no call is due. Otherwise half: eight clips that finish together hold up the others by
    four decodes at most, and a stream of short drafts can't pile up faster than it is decoded.
    """
    return (backlog + 1) // 2 if stepping else backlog
