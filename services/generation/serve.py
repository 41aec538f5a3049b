"""The generation service for `services.runtime.serving`, and its metrics for Prometheus."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from milonga.v1 import generation_pb2_grpc, operator_pb2_grpc
from services.catalogue import GENERATION
from services.fairness import Account
from services.generation.settings import (
    GenerationSettings,
    adapter_sources,
    model_uris,
    read_operator_token,
)
from services.runtime.callers import current_caller
from services.runtime.metrics import ServerMetrics, counters, served_weights
from services.runtime.server import Server
from services.runtime.serving import Service
from services.weights.uri import resolve

if TYPE_CHECKING:
    from services.generation.slot import EngineSlot

COUNTERS: Final = {
    "calls": ("milonga_denoiser_calls", "Calls of the denoiser, each one step of a batch."),
    "clip_steps": ("milonga_denoising_steps", "Denoising steps, summed over clips."),
    "rows": ("milonga_denoiser_rows", "Rows computed in denoiser calls, padding included."),
    "padding_rows": ("milonga_denoiser_padding_rows", "Rows of padding in denoiser calls."),
    "clips": ("milonga_clips", "Clips made."),
    "audio_seconds": ("milonga_audio_seconds", "Seconds of audio made."),
}
"""Name and help of each counter, by its field of `EngineStats`."""

OUTCOMES: Final = ("finished", "cancelled", "expired", "failed")
"""Fields of `EngineStats` that count ended requests."""


def check(settings: GenerationSettings) -> bool:
    """See `Service.check`."""
    read_operator_token(settings)
    adapter_sources(settings)
    return any(uri.needs_network for uri in model_uris(settings).values())


def load(settings: GenerationSettings) -> "EngineSlot":
    """Load the engine of the model that the settings name. Raises `MilongaError`."""
    model = resolve(model_uris(settings)[GENERATION.model])
    # Torch takes seconds to import, and a wrong model should be refused at once.
    from services.generation.slot import EngineSlot, Served, load_engine

    return EngineSlot(Served(load_engine(settings, model), model.folder), partial(load_engine, settings))


def add_generation(
    server: Server, metrics: ServerMetrics, slot: "EngineSlot", settings: GenerationSettings
) -> None:
    """Add a slot's services and metrics to a server; OperatorService only if there is a token."""
    from services.generation import operator, servicer
    from services.generation.inference import GenerationInference, SlotOperator
    from services.inference import INFER, add_inference

    metrics.add(partial(collect, slot))
    slot.observe(metrics.observer("engine", "queue_wait", "first_step", "step", "decode", "fill"))
    generation = servicer.GenerationServicer(slot)
    server.add(
        servicer.SERVICE_NAME,
        lambda to: generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, to),
    )
    rpcs = (f"/{servicer.SERVICE_NAME}/{rpc}" for rpc in ("GenerateAudio", "StreamGenerateAudio"))
    server.gate.add(
        (*rpcs, INFER),
        partial(_if_room, slot),
    )
    token = read_operator_token(settings)
    if token is not None:
        server.access.allow_operator(token)
    loading = None
    if server.access.has_operators:
        switcher = operator.Switcher(slot, settings)
        switching, loading = operator.OperatorServicer(switcher), SlotOperator(switcher)
        server.add(
            operator.SERVICE_NAME,
            lambda to: operator_pb2_grpc.add_OperatorServiceServicer_to_server(switching, to),
        )
    add_inference(server, GenerationInference(slot), loading)


@contextmanager
def _if_room(slot: "EngineSlot") -> Iterator[None]:
    caller = current_caller()
    slot.current.engine.check(Account(caller.key, caller.priority))
    yield


def describe(slot: "EngineSlot") -> dict[str, Any]:
    """See `Service.describe`."""
    model = slot.current.version
    return {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "folder": str(slot.current.folder),
    }


def collect(slot: "EngineSlot") -> Iterator[Metric]:
    """Yield the metrics of a slot's engines and of the served weights."""
    stats = slot.stats
    yield GaugeMetricFamily(
        "milonga_queue_depth", "Clips that wait for a place in the batch.", stats.queue_depth
    )
    yield GaugeMetricFamily(
        "milonga_running", "Requests in the engine, waiting ones included.", stats.running
    )
    yield from counters(COUNTERS, stats)
    ended = CounterMetricFamily("milonga_engine_requests", "Requests that ended.", labels=["outcome"])
    for outcome in OUTCOMES:
        ended.add_metric([outcome], getattr(stats, outcome))
    yield ended
    yield served_weights("milonga_model", "The served weights.", slot.current.version)


SERVICE: Final = Service(
    name=GENERATION.name,
    settings=GenerationSettings,
    check=check,
    load=load,
    add=add_generation,
    watch=lambda slot, on_failure: slot.watch(on_failure),
    describe=describe,
    close=lambda slot: slot.close(),
)
