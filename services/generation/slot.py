"""The served model, and its replacement by another under load.

::

    with slot.lease() as served:            # once per call, so that the whole answer is of one model
        …served.engine, served.version…
    await slot.switch(uri)                  # loads alongside; new calls get the new one
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import torch

from services.api.measurements import Observer, ignore
from services.api.model import ModelSwitch, ModelVersion
from services.engine import Engine, EngineStats
from services.errors import (
    AlreadyUnderWayError,
    DeadlineExceededError,
    MilongaError,
    ModelError,
    ModelFormatError,
    NotFiniteError,
    RequestCancelledError,
    ServiceUnavailableError,
)
from services.generation.settings import GenerationSettings, adapter_sources
from services.models.architectures import load_generator
from services.models.watermark import marker
from services.weights.adapters import AdapterStore
from services.weights.uri import ModelURI, ResolvedModel, resolve

log = structlog.get_logger()

SIZES = ("sampling_rate", "hop_length", "mel_bins", "latent_channels", "latent_downsampling")
"""Fields of `ModelGeometry` that must be equal for a model to replace the served one under load."""

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
        """The version of the weights."""
        return self.engine.description.model


class EngineSlot:
    """Holds the served model. Belongs to one event loop, but for `stats` and `current`."""

    def __init__(self, served: Served, load: Callable[[ResolvedModel], Engine]) -> None:
        """Hold `served`. `load` makes the engine of another model; it is called on a thread."""
        self._current = served
        self._load = load
        self._switching: asyncio.Task[ModelSwitch] | None = None
        self._abandoned = threading.Event()
        self._leaving: set[asyncio.Task[None]] = set()
        self._closing = False
        self._watchers: list[Callable[[str], None]] = []
        self._observer: Observer = ignore
        # Statistics of closed engines, and the open models. One attribute, so that threads read both at once.
        self._counts: tuple[EngineStats, tuple[Served, ...]] = (EngineStats(), (served,))

    @property
    def current(self) -> Served:
        """The model that a new call would use."""
        return self._current

    @property
    def stats(self) -> EngineStats:
        """Statistics of all engines since the start, closed ones included."""
        closed, opened = self._counts
        return sum((served.engine.stats for served in opened), closed)

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Have `on_failure` called with the reason when an engine ends for good."""
        self._watchers.append(on_failure)
        for served in self._counts[1]:
            served.engine.watch(on_failure)

    def observe(self, observer: Observer) -> None:
        """Have `observer` called with each measurement of every engine from now on."""
        self._observer = observer
        for served in self._counts[1]:
            served.engine.observe(observer)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Served]:
        """Hold the served model for one call. It stays open even if another model is switched to."""
        served = self._current
        served.calls += 1
        try:
            yield served
        finally:
            served.calls -= 1
            self._let_go(served)

    async def switch(self, uri: ModelURI, timeout: float | None = None) -> ModelSwitch:
        """Load the model of `uri` alongside the served one, and use it for new calls.

        If the caller is cancelled, or after `timeout` seconds, the switch is abandoned: its thread ends after
        the step that it is in, and what it loaded is closed.

        Raises:
            AlreadyUnderWayError: another switch is under way, or an abandoned one has not ended yet.
            DeadlineExceededError: it took longer than `timeout` seconds.
            ServiceUnavailableError: the service is stopping; or `uri`'s registry does not answer.
            ModelError: the model was refused. The served model stays in use.
        """
        if self._closing:
            raise ServiceUnavailableError("the service is stopping; try another, or later")
        if self._switching is not None:
            raise AlreadyUnderWayError("another switch is under way; try again when it has ended")
        self._abandoned = threading.Event()
        self._switching = asyncio.create_task(self._switch(uri, self._abandoned))
        self._switching.add_done_callback(self._switch_ended)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._switching)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the switch took longer than {timeout:g} s, and was abandoned; the served model stays"
            ) from error
        finally:
            self._abandoned.set()  # unless it has ended

    async def close(self) -> None:
        """Close every engine; requests in progress fail."""
        self._closing = True
        self._abandoned.set()
        if self._switching is not None:
            await asyncio.wait([self._switching])
        for served in self._counts[1]:
            served.left.set()
        self._retire(self._current)
        await asyncio.gather(*self._leaving)

    async def _switch(self, uri: ModelURI, abandoned: threading.Event) -> ModelSwitch:
        start = time.monotonic()
        previous = self._current
        model = await asyncio.to_thread(resolve, uri)
        _check_wanted(abandoned)
        if model.identity != previous.version:
            served = await asyncio.to_thread(self._open, model, previous.engine, abandoned)
            if abandoned.is_set():
                await asyncio.to_thread(served.engine.close)
            _check_wanted(abandoned)
            for on_failure in self._watchers:
                served.engine.watch(on_failure)
            served.engine.observe(self._observer)
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
            # A caller that still waits gets the error, too; the interceptor logs tracebacks.
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

    def _open(self, model: ResolvedModel, served: Engine, abandoned: threading.Event) -> Served:
        """Load a model that can replace that of `served`, and have it make a clip."""
        try:
            engine = self._load(model)
            try:
                _check_wanted(abandoned)
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
        """Close a model that is no longer served as soon as its last call has ended."""
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
            # Memory that the allocator keeps for later tensors is lost to the other model.
            torch.cuda.empty_cache()
        if not self._closing:
            log.info("unloaded", digest=digest)


def _check_wanted(abandoned: threading.Event) -> None:
    if abandoned.is_set():
        raise RequestCancelledError("the switch was abandoned: its caller is gone, or its time is up")


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
    """Make the shortest clip in one step: weights of the right shapes may still be all NaN."""
    request = engine.request(
        _TRIAL_PROMPT, duration=engine.limits.min_duration, seed=0, num_inference_steps=1
    )
    try:
        engine.generate(request)
    except Exception as error:
        if isinstance(error, MilongaError) and not isinstance(error, NotFiniteError):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelFormatError(f"model: {_named(model)} makes no sound: {reason}") from error


def load_engine(settings: GenerationSettings, model: ResolvedModel) -> Engine:
    """Load a resolved model onto an engine. Raises `ModelError` and `InvalidInputError`."""
    pipeline = load_generator(
        model.folder, device=settings.device, dtype=settings.dtype, offload=settings.offload
    )
    rate = pipeline.description.geometry.sampling_rate
    mark = marker(settings.watermark, model.digest, rate, str(pipeline.device))
    adapters = AdapterStore(pipeline, adapter_sources(settings), model.digest)
    adapters.load_listed()
    return Engine(pipeline, settings, model.identity, mark, adapters)
