"""Decode the clips of a request: within the budget of bytes, in turns by caller, and clip by clip."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from milonga.v1 import audio_pb2
from services.audio.clips import CallSize, clips_steps, measure_clips, measure_pairs, pairs_steps
from services.audio.decoding import AudioBounds, ReadClip
from services.audio.steps import Steps
from services.errors import FieldViolation, InvalidInputError
from services.runtime import tracing
from services.runtime.budget import current_hold
from services.runtime.callers import current_caller
from services.runtime.offloading import OffLoop

Kept = TypeVar("Kept", covariant=True)
Result = TypeVar("Result")


class Preparation(Protocol[Kept]):
    """What a service makes of the clips of a request."""

    def check(self, seconds: float) -> None:
        """Raise `QueueFullError` if the queue of a model has no room for seconds of sound."""

    def kept_bytes(self, seconds: float) -> int:
        """Return the size of what is kept of a clip of this length."""

    def prepare(self, clip: ReadClip) -> Kept:
        """Return what is kept of a clip. Called on a thread; blocks for milliseconds."""


class ClipDecoder:
    """Decodes the clips of a service's requests. Belongs to one event loop.

    Before a request is decoded, its size is read from the headers of its clips. By that it is refused if it
    exceeds `bounds`, if the model's queue, the caller's quota or the process has no room for it, or if it
    could not be done before its deadline.
    """

    def __init__(self, bounds: AudioBounds) -> None:
        self.bounds = bounds
        self._off_loop = OffLoop()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run other work of a request on the same threads, as one step. See `OffLoop`."""
        return await self._off_loop(work)

    async def clips(
        self,
        clips: Sequence[audio_pb2.Clip],
        preparation: Preparation[Kept],
        faults: Sequence[FieldViolation] = (),
    ) -> list[Kept]:
        """Return what is kept of each of the field ``clips``.

        Raises:
            InvalidInputError: a clip is invalid, or `faults` is not empty; lists every violation.
            QueueFullError: there is no room for the request; says where.
            DeadlineExceededError: decoding would take too long.
        """
        with also(faults):
            size = await self._off_loop(lambda: measure_clips(clips, "clips", self.bounds))
            steps = clips_steps(clips, "clips", self.bounds, preparation.prepare)
            return await self._decode(size, preparation, steps)

    async def pairs(
        self,
        pairs: Sequence[audio_pb2.PromptedClip],
        preparation: Preparation[Kept],
        faults: Sequence[FieldViolation] = (),
    ) -> list[tuple[str, Kept]]:
        """Return the prompt and what is kept of the clip of each of the field ``pairs``. See `clips`."""
        with also(faults):
            size = await self._off_loop(lambda: measure_pairs(pairs, "pairs", self.bounds))
            steps = pairs_steps(pairs, "pairs", self.bounds, preparation.prepare)
            return await self._decode(size, preparation, steps)

    async def _decode(self, size: CallSize, preparation: Preparation[Kept], steps: Steps[Result]) -> Result:
        seconds = sum(size.seconds)
        preparation.check(seconds)
        current_caller().charge(seconds)
        hold, message = current_hold(), current_hold().size
        kept = sum(map(preparation.kept_bytes, size.seconds))
        # The largest clip is there twice: as blocks, and joined.
        hold.resize(message + kept + 8 * size.largest)
        with tracing.span("decode", clips=len(size.seconds)):
            result = await self._off_loop.steps(steps, work=size.samples)
        # What the request was read from is let go now.
        hold.resize(kept)
        return result


@contextmanager
def also(faults: Sequence[FieldViolation]) -> Iterator[None]:
    """Raise `InvalidInputError` at the end of the context for `faults`, with those of the context."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(*error.violations, *faults) from error
    if faults:
        raise InvalidInputError(*faults)
