"""How fast the device works, by running means, and how long a request takes.

The unit of work is a denoising step of one row and one latent frame. A decode counts as the steps that take
as long.
"""

from collections.abc import Hashable, Mapping
from typing import Final, Generic, TypeVar

from services.engine.batching import GUIDED_ROWS, UNGUIDED_ROWS
from services.engine.states import RequestState

Key = TypeVar("Key", bound=Hashable)

SLACK: Final = 0.9
"""Share of the time to its deadline that a request may be planned to take."""

_SMOOTHING: Final = 0.1
"""Weight of the newest measurement in the running means."""


class _Means(Generic[Key]):
    """Running means by key. One thread writes; others read whole snapshots."""

    def __init__(self) -> None:
        self.values: Mapping[Key, float] = {}
        self._begun: set[Key] = set()

    def add(self, key: Key, value: float) -> None:
        """Add a measurement. The first of a key does not count: it may include compilations."""
        if key in self._begun:
            mean = self.values.get(key, value)
            self.values = {**self.values, key: mean + _SMOOTHING * (value - mean)}
        self._begun.add(key)


class Pace:
    """Running means of the device's times. The worker adds measurements; any thread may read."""

    def __init__(self) -> None:
        self._steps = _Means[tuple[int, int]]()
        self._decodes = _Means[int]()
        self.unit: float | None = None
        """Seconds of a unit of work in calls of the most efficient shape; None before any was measured."""

    def add_step(self, frames: int, rows: int, seconds: float) -> None:
        """Add the time of a step of `rows` rows, padding included."""
        self._steps.add((frames, rows), seconds / (frames * rows))
        self.unit = min(self._steps.values.values(), default=None)

    def add_decode(self, frames: int, seconds: float) -> None:
        """Add the time to decode a clip of `frames` latent frames."""
        self._decodes.add(frames, seconds / frames)

    def step(self, frames: int, rows: int) -> float:
        """Return the seconds of a step of `rows` rows: as measured, otherwise as for the best shape."""
        return self._steps.values.get((frames, rows), self.unit or 0.0) * frames * rows

    def decode(self, frames: int) -> float:
        """Return the seconds to decode a clip: as measured, otherwise in proportion to its length."""
        known = self._decodes.values
        return known.get(frames, min(known.values(), default=0.0)) * frames

    def work(self, seconds: float) -> float:
        """Return the work that takes so long."""
        return seconds / self.unit if self.unit else 0.0

    def left(self, state: RequestState) -> float:
        """Return the seconds of the device that a request still takes, in the most efficient calls."""
        work = state.rows_ahead * state.frames * (self.unit or 0.0)
        return work + state.undecoded * self.decode(state.frames)

    def finish(self, state: RequestState, ahead: float, within: float) -> float:
        """Estimate the seconds until a request ends, with `ahead` seconds of the device before it.

        In large calls the device works meanwhile for later requests, which are half done on average when this
        one ends; small calls take longer for the same work. The size that counts is the most efficient one in
        which the request would be done `within` so many seconds if it started now.
        """
        work = self.left(state)
        clip = work / state.request.clip_count
        ends: dict[float, float] = {}
        for (frames, rows), unit in self._steps.values.items():
            clips, slower = rows / state.rows, unit / (self.unit or unit)
            if frames == state.frames and clips >= 1:
                sharing = (clips - 1) * clip
                if slower * (work + sharing) <= SLACK * within:
                    ends[unit] = slower * (ahead + work + sharing / 2)
        return max(ends[min(ends)] if ends else ahead + work, self.shortest(state))

    def slack(self, state: RequestState, seconds: float) -> float:
        """Return how long each step of a request may take, so that it is done within `seconds`."""
        return (seconds - self.decode(state.frames) * state.undecoded) / max(1, state.steps_ahead)

    def shortest(self, state: RequestState) -> float:
        """Return the seconds that a request still takes at least, if it has the device to itself."""
        guided = state.guided_steps_ahead
        steps = self.step(state.frames, GUIDED_ROWS) * guided
        steps += self.step(state.frames, UNGUIDED_ROWS) * (state.steps_ahead - guided)
        return steps + self.decode(state.frames)

    def clip(self, *, frames: int, rows: int) -> float:
        """Return the work of a clip that takes so many `rows` of denoiser calls."""
        return frames * rows + self.work(self.decode(frames))
