"""The engine's scheduling decisions as pure functions: which group runs next, and with which batch shape.

A *row* is one sample of a denoiser call. A clip takes two rows with guidance (unconditional, conditional), or
one without. Rows are independent in the denoiser: other rows don't change a clip; only their number may
change its rounding.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

GUIDED_ROWS = 2
UNGUIDED_ROWS = 1


def rows_of(guidance_scale: float) -> int:
    """Return the rows of a clip in a denoiser call. A scale up to 1 means no guidance, as in diffusers."""
    return GUIDED_ROWS if guidance_scale > 1 else UNGUIDED_ROWS


def row_shapes(batch_shapes: Iterable[int]) -> tuple[int, ...]:
    """Return the ascending row counts that calls are padded to, for batch shapes counted in clips.

    Each shape counts once (no clip guided) and doubled (all guided): (1, 2, 4, 8) gives 1, 2, 4, 8, 16.
    """
    shapes = tuple(batch_shapes)
    return tuple(sorted({rows * shape for shape in shapes for rows in (UNGUIDED_ROWS, GUIDED_ROWS)}))


def choose_rows(rows: int, shapes: Sequence[int], *, exact: bool) -> int:
    """Return the row count to pad `rows` rows to: the smallest that fits, or with `exact` the largest."""
    assert 0 < rows <= shapes[-1]
    return shapes[-1] if exact else next(shape for shape in shapes if shape >= rows)


def next_turn(work: Mapping[Key, float]) -> Key:
    """Return the group whose clips have had the least work so far; among equals, the oldest group.

    `work` maps a group to the latent frames that each of its clips was given. Charging a turn with the
    length, not with the number of clips, gives every *clip* an equal share of the device: a short clip takes
    several steps for each step of a long one, and a large group is not penalised for its size.
    """
    return min(work, key=lambda key: work[key])


def entry_work(work: Iterable[float]) -> float:
    """Return the initial work of a new group: the least of the present groups.

    Starting at 0, it would occupy the device until it had caught up with the others.
    """
    return min(work, default=0.0)


def queue_tag(now: float, clip_index: int) -> float:
    """Return the queue tag of a request's clip; `now` is the tag of the clip that started last.

    Start-time fair queueing (Goyal et al., 1996) with equal weights: a request's second clip queues behind
    the first clips of all waiting requests. No clip starves, since `now` only grows.
    """
    return now + clip_index


def decodes_this_turn(backlog: int, *, stepping: bool) -> int:
    """Return how many finished clips to decode before the next denoiser call.

    All of them if no call is due. Otherwise half: eight clips that finish at once delay the others by at most
    four decodes, and finished short clips can't accumulate faster than they are decoded.
    """
    return (backlog + 1) // 2 if stepping else backlog
