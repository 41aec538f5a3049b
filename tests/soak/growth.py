"""Whether a process grows: a line through its memory, and the range of its threads and descriptors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from scipy import stats

from tests.soak.processes import Sample

WARM_UP_SECONDS: Final = 60.0
"""Least warm-up of a process: caches fill, and the allocator's pools take their size."""
WARM_UP: Final = 0.4
"""The same as a share of its life: that takes longer, ever more slowly."""
_BLOCKS: Final = 20
"""Means of so many equal parts are fitted: neighbouring samples are not independent, these nearly are."""
_CONFIDENCE: Final = 0.99
NEGLIGIBLE: Final = 0.01
"""Growth over the fitted time, as a share of the memory, that is taken for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """How a process changed after its warm-up."""

    minutes: float
    rss_mib: float
    """Mean."""
    slope: float
    """MiB per hour."""
    error: float
    """Half the width of the slope's 99 % confidence interval."""
    threads: tuple[int, int]
    """Maximum in the first and in the second half."""
    descriptors: tuple[int, int]

    @property
    def faults(self) -> list[str]:
        """Say what grows."""
        faults = []
        least = (self.slope - self.error) * self.minutes / 60
        if least > NEGLIGIBLE * self.rss_mib:
            faults.append(f"memory grows by {self.slope:.1f} ± {self.error:.1f} MiB an hour")
        for name, (before, after) in (("threads", self.threads), ("descriptors", self.descriptors)):
            if after > 1.2 * before + 4:
                faults.append(f"{name} grow from {before} to {after}")
        return faults


def growth(samples: Sequence[Sample], start: float) -> Growth | None:
    """Return the growth of a process that started at `start`; None with too few samples after its warm-up."""
    end = samples[-1].at if samples else start
    first = start + max(WARM_UP_SECONDS, WARM_UP * (end - start))
    warm = [sample for sample in samples if sample.at >= first]
    if len(warm) < 2 * _BLOCKS:
        return None
    edges = np.linspace(0, len(warm), _BLOCKS + 1).round().astype(int)
    blocks = [warm[left:right] for left, right in pairwise(edges)]
    hours = [np.mean([sample.at for sample in block]) / 3600 for block in blocks]
    rss_mib = [np.mean([sample.rss for sample in block]) / 2**20 for block in blocks]
    line = stats.linregress(hours, rss_mib)
    middle = len(warm) // 2

    def maxima(name: str) -> tuple[int, int]:
        values = [getattr(sample, name) for sample in warm]
        return max(values[:middle]), max(values[middle:])

    return Growth(
        minutes=(warm[-1].at - warm[0].at) / 60,
        rss_mib=float(np.mean(rss_mib)),
        slope=float(line.slope),
        error=float(line.stderr * stats.t.ppf((1 + _CONFIDENCE) / 2, _BLOCKS - 2)),
        threads=maxima("threads"),
        descriptors=maxima("descriptors"),
    )
