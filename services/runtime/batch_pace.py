"""How long a batch takes: a fixed time and a time per cost, by least squares over the recent batches."""

from typing import Final

_MEMORY: Final = 50
"""Batches over which the weights of measurements fall to 1/e."""
_SPREAD: Final = 0.1
"""Relative standard deviation of the costs from which a fixed time can be told from the time per cost."""
_MAX_SLOWDOWN: Final = 1.5
"""How many times longer a batch may take for items whose turn it is not."""
_EFFICIENT: Final = 0.95
"""Share of the throughput of the largest batch from which a smaller one is as good."""
TRIAL: Final = 2.0
"""Growth of a batch of unknown time, so that it gets known."""


class BatchPace:
    """The times of a model's batches. One thread writes; others may read."""

    def __init__(self) -> None:
        self._begun = False
        self._count = self._x = self._y = self._xx = self._xy = 0.0
        """Weighted sums over batches: 1, cost, seconds, and products."""
        self._fixed, self._slope = 0.0, 0.0
        self.known = False
        """Whether the fixed time is known: batches of different costs were measured."""
        self.unit: float | None = None
        """Seconds per cost of recent batches; None before any was measured."""

    def add(self, cost: float, seconds: float) -> None:
        """Add a measurement. The first does not count: it may include compilations."""
        if not self._begun:
            self._begun = True
            return
        sums = (self._count, self._x, self._y, self._xx, self._xy)
        new = (1.0, cost, seconds, cost * cost, cost * seconds)
        self._count, self._x, self._y, self._xx, self._xy = (
            one * (1 - 1 / _MEMORY) + more for one, more in zip(sums, new, strict=True)
        )
        mean_x, mean_y = self._x / self._count, self._y / self._count
        variance = self._xx / self._count - mean_x**2
        self.known = variance > (_SPREAD * mean_x) ** 2
        slope = (self._xy / self._count - mean_x * mean_y) / variance if self.known else mean_y / mean_x
        self._slope = min(max(slope, 0.0), mean_y / mean_x)
        self._fixed = mean_y - self._slope * mean_x
        self.unit = self._y / self._x

    @property
    def usual(self) -> float:
        """Mean cost of recent batches."""
        return self._x / self._count if self._count else 0.0

    def seconds(self, cost: float) -> float:
        """Return the time of a batch of `cost`; 0 if unknown."""
        return self._fixed + self._slope * cost

    def within(self, seconds: float) -> float:
        """Return the cost of the largest batch that takes at most `seconds`."""
        spare = seconds - self._fixed
        return spare / self._slope if self._slope else float("inf") if spare >= 0 else 0.0

    def spare(self, entitled: float, least: float) -> float:
        """Return the cost up to which other items hardly slow down a batch of the cost `entitled`.

        `least` is the cost of its first item.
        """
        if not self.known:
            return max(entitled, TRIAL * least)
        return max(entitled, self.within(_MAX_SLOWDOWN * self.seconds(entitled)))

    def efficient(self, least: float, largest: float) -> float:
        """Return the cost of a batch that is about as efficient as the `largest`; at least `least`."""
        if not self.known:
            return largest
        share = _EFFICIENT * largest
        enough = share * self._fixed / (self.seconds(largest) - share * self._slope)
        return min(self.spare(max(least, enough), least), largest)
