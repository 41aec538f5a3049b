"""The model that is served, and how another takes its place under load.

::

    with slot.lease() as served:            # once a call: everything the answer says is of this one model
        …served.engine, served.version…
    await slot.switch(uri)                  # loads alongside; new calls get the new one
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import torch

from services.api.model import ModelSwitch, ModelVersion
from services.engine import Engine, EngineStats
from services.errors import (
    AlreadyUnderWayError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ServiceUnavailableError,
)
from services.generation.settings import GenerationSettings
from services.models.architectures import load_generator
from services.weights.uri import ModelURI, ResolvedModel, resolve

log = structlog.get_logger()

SIZES = ("sampling_rate", "hop_length", "mel_bins", "latent_channels", "latent_downsampling")
"""Fields of `ModelGeometry` in which a model must agree with the one that it replaces under load."""

_TRIAL_PROMPT = "a sound"


class Served:
    """One model on its engine."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.calls = 0
        """Calls that hold it."""
        self.left = asyncio.Event()
        """Set when no call holds it, and none will again."""

    @property
    def version(self) -> ModelVersion:
        """Which weights it is."""
        return self.engine.description.model


class EngineSlot:
    """Holds the served model. Belongs to one event loop, but for `stats` and `current`."""

    def __init__(self, served: Served, load: Callable[[ResolvedModel], Engine]) -> None:
        """`load` makes the engine of another model; it runs on a thread."""
        self._current = served
        self._load = load
        self._switching: asyncio.Task[ModelSwitch] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._closing = False
        # What closed engines counted, and the open ones: one attribute, so that threads read both or neither.
        self._counts: tuple[EngineStats, tuple[Served, ...]] = (EngineStats(), (served,))

    @property
    def current(self) -> Served:
        """What a call would get now."""
        return self._current

    @property
    def stats(self) -> EngineStats:
        """What all engines have done since the start, together."""
        closed, opened = self._counts
        return sum((served.engine.stats for served in opened), closed)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Served]:
        """Hold what is served for the time of one call: it stays open, whatever is switched to meanwhile."""
        served = self._current
        served.calls += 1
        try:
            yield served
        finally:
            served.calls -= 1
            self._let_go(served)

    async def switch(self, uri: ModelURI) -> ModelSwitch:
        """Load what `uri` names alongside the served model, and give it to new calls.

        Once begun, a switch is completed, even if its caller is cancelled.

        Raises:
            AlreadyUnderWayError: another switch is under way.
            ServiceUnavailableError: the service is stopping; or `uri`'s registry does not answer.
            ModelError: what it names was refused. The served model goes on.
        """
        if self._closing:
            raise ServiceUnavailableError("the service is stopping; try another, or later")
        if self._switching is not None:
            raise AlreadyUnderWayError("another switch is under way; try again when it has ended")
        self._switching = asyncio.create_task(self._switch(uri))
        self._switching.add_done_callback(self._switch_ended)
        return await asyncio.shield(self._switching)

    async def close(self) -> None:
        """Close every engine; what still runs on one is failed."""
        self._closing = True
        if self._switching is not None:
            await asyncio.wait([self._switching])
        for served in self._counts[1]:
            served.left.set()
        self._retire(self._current)
        await asyncio.gather(*self._leaving)

    async def _switch(self, uri: ModelURI) -> ModelSwitch:
        start = time.monotonic()
        previous = self._current
        model = await asyncio.to_thread(resolve, uri)
        if model.identity != previous.version:
            served = await asyncio.to_thread(self._open, model, previous.engine)
            closed, opened = self._counts
            self._counts = (closed, (*opened, served))
            self._current = served
            self._retire(previous)
        return ModelSwitch(
            previous=previous.version, current=self._current.version, seconds=time.monotonic() - start
        )

    def _switch_ended(self, task: asyncio.Task[ModelSwitch]) -> None:
        self._switching = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # The caller gets the error, too, if it is still there; the interceptor logs tracebacks.
            log.warning("switch refused", reason=str(error)[:1000])
        elif not task.cancelled():
            switch = task.result()
            log.info(
                "switched",
                previous=switch.previous.digest,
                model=switch.current.name,
                version=switch.current.version,
                digest=switch.current.digest,
                seconds=round(switch.seconds, 2),
            )

    def _open(self, model: ResolvedModel, served: Engine) -> Served:
        """Load a model that can replace that of `served`, and have it make a clip."""
        try:
            engine = self._load(model)
            try:
                _check_kind(model, engine, served)
                _try_out(model, engine)
                return Served(engine, model.folder)
            except BaseException:
                engine.close()
                raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ModelError(
                f"model: {_named(model)} does not fit into memory alongside the served model; "
                "start a service with it instead"
            ) from error

    def _let_go(self, served: Served) -> None:
        if served is not self._current and not served.calls:
            served.left.set()

    def _retire(self, served: Served) -> None:
        """Close what is no longer served as soon as its last call has ended."""
        self._let_go(served)
        task = asyncio.create_task(self._close(served))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _close(self, served: Served) -> None:
        await served.left.wait()
        await asyncio.to_thread(served.engine.close)
        closed, opened = self._counts
        self._counts = (closed + served.engine.stats, tuple(one for one in opened if one is not served))
        digest = served.version.digest
        del served
        if torch.cuda.is_available():
            # What the allocator keeps for tensors to come, the other model's are larger by.
            torch.cuda.empty_cache()
        if not self._closing:
            log.info("unloaded", digest=digest)


def _check_kind(model: ResolvedModel, found: Engine, served: Engine) -> None:
    ours, theirs = (_kind(engine) for engine in (served, found))
    wrong = [f"{name} {theirs[name]}, not {value}" for name, value in ours.items() if theirs[name] != value]
    if wrong:
        raise ModelFormatError(
            f"model: {_named(model)} is of another kind than the served model: "
            f"{', '.join(wrong)}; start a service with it instead"
        )


def _kind(engine: Engine) -> dict[str, object]:
    """Return the family and the sizes of the model of `engine`."""
    geometry = engine.description.geometry
    return {"family": type(engine.pipeline).__name__} | {name: getattr(geometry, name) for name in SIZES}


def _named(model: ResolvedModel) -> str:
    return f"{model.identity.name} {model.identity.version}"


def _try_out(model: ResolvedModel, engine: Engine) -> None:
    """Make the shortest clip in one step: weights of the right shapes may still hold nothing but NaN."""
    request = engine.request(
        _TRIAL_PROMPT, duration=engine.limits.min_duration, seed=0, num_inference_steps=1
    )
    try:
        engine.generate(request)
    except MilongaError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelFormatError(f"model: {_named(model)} makes no sound: {reason}") from error


def load_engine(settings: GenerationSettings, model: ResolvedModel) -> Engine:
    """Load the engine of a model that was found. Raises `ModelError` and `InvalidInputError`."""
    pipeline = load_generator(model.folder, device=settings.device, dtype=settings.dtype)
    return Engine(pipeline, settings, model.identity)
