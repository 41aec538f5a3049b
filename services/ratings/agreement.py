"""How far raters agree: Krippendorff's alpha, consistency of each rater, and the share of wins."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Final

_Z95: Final = 1.959963984540054


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Return Krippendorff's alpha for nominal values: 1 is agreement, 0 is chance.

    None if no unit has two values, or all values are the same (alpha is then undefined).

    Args:
        units: the values that raters gave to each unit; missing ones are left out.

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    paired = [Counter(values) for values in units if len(values) > 1]
    totals: Counter[Hashable] = Counter()
    observed = 0.0
    for values in paired:
        size = values.total()
        totals.update(values)
        observed += sum(count * (size - count) for count in values.values()) / (size - 1)
    n = totals.total()
    expected = sum(count * (n - count) for count in totals.values())
    if not expected:
        return None
    return 1 - (n - 1) * observed / expected


def wilson_interval(wins: float, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, z2 = wins / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
