"""The batch shapes of denoiser calls, and which clips share one.

A *row* is one sample of a denoiser call. A clip takes two rows in a guided step (unconditional, conditional),
and one in others or of a distilled denoiser. Rows are independent in the denoiser: other rows don't change a
clip; only their number may change its rounding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

GUIDED_ROWS = 2
UNGUIDED_ROWS = 1

MAX_SLOWDOWN: Final = 1.5
"""How many times longer a call may take for clips whose turn it is not."""


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


def spare_rows(entitled: int, shapes: Sequence[int], seconds: Callable[[int], float]) -> int:
    """Return the rows of the call in which `entitled` rows are hardly slowed down by those of others.

    `seconds` maps the rows of a call to its time. Padding is free; on a device that a small call does not
    occupy, larger calls are nearly so.
    """
    alone = next(shape for shape in shapes if shape >= entitled)
    limit = MAX_SLOWDOWN * seconds(alone)
    return max((shape for shape in shapes if shape > alone and seconds(shape) <= limit), default=alone)
