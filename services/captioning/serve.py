"""The captioning service's `SERVICE`, which `services.runtime.serving` runs, and its Prometheus metrics."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from milonga.v1 import captioning_pb2_grpc as rpc
from services.captioning.settings import CaptioningSettings, find_models, model_uris
from services.catalogue import CAPTIONING
from services.runtime.metrics import ServerMetrics, counters, served_weights
from services.runtime.server import Server
from services.runtime.serving import Service

if TYPE_CHECKING:
    from services.captioning.loading import LoadedCaptioner
    from services.captioning.worker import CaptionWorker

COUNTERS: Final = {
    "items": ("milonga_captioning_clips", "Clips described."),
    "calls": ("milonga_captioning_calls", "Calls of the model, each one batch."),
    "cost": (
        "milonga_captioning_audio_seconds",
        "Seconds of audio described, in proportion to the beams of each clip.",
    ),
}
"""Fields of `BatchStats`, each with its counter's name and help."""


def check(settings: CaptioningSettings) -> bool:
    """See `Service.check`."""
    return any(uri.needs_network for uri in model_uris(settings).values())


def load(settings: CaptioningSettings) -> "LoadedCaptioner":
    """Load the models that `settings` names. Raises `MilongaError`."""
    found = find_models(settings)
    # Imported last: importing torch takes seconds, and a wrong setting or model should be refused at once.
    from services.captioning import loading

    return loading.load(settings, found)


def add_captioning(
    server: Server, metrics: ServerMetrics, loaded: "LoadedCaptioner", settings: CaptioningSettings
) -> None:
    """Add CaptioningService, the Open Inference Protocol and the metrics of the worker to a server."""
    from services.captioning.inference import CaptioningInference
    from services.captioning.servicer import SERVICE_NAME, CaptioningServicer
    from services.inference import INFER, add_inference

    servicer = CaptioningServicer(loaded.worker, settings, loaded.refiner)
    metrics.add(partial(collect, loaded.worker))
    loaded.worker.batcher.observe = metrics.observer("clips", "queue_wait", "batch", "fill")
    server.add(SERVICE_NAME, lambda to: rpc.add_CaptioningServiceServicer_to_server(servicer, to))
    add_inference(server, CaptioningInference(servicer))
    server.gate.add((f"/{SERVICE_NAME}/CaptionAudio", INFER), partial(loaded.worker.batcher.expect, 1))


def describe(loaded: "LoadedCaptioner") -> dict[str, Any]:
    """See `Service.describe`."""
    model = loaded.worker.model
    version, scorer = model.version, model.scorer
    clap = {} if scorer is None else {"clap": {"model": scorer.model.name, "digest": scorer.model.digest}}
    return {
        "model": version.name,
        "version": version.version,
        "digest": version.digest,
        "folder": str(loaded.worker.folder),
        **clap,
        "refines": model.defaults.can_refine,
    }


def collect(worker: "CaptionWorker") -> Iterator[Metric]:
    """Yield the metrics of a worker, of its stages and of its weights."""
    model, stats = worker.model, worker.batcher.stats
    yield GaugeMetricFamily(
        "milonga_captioning_queue_seconds", "Seconds of audio in the queue.", stats.queue_cost
    )
    yield from counters(COUNTERS, stats)
    stages = CounterMetricFamily(
        "milonga_captioning_stage_seconds", "Time in batches, by stage.", labels=["stage"]
    )
    for stage, seconds in model.stage_seconds.items():
        stages.add_metric([stage], seconds)
    yield stages
    yield served_weights("milonga_model", "The served weights.", model.version)
    if model.scorer is not None:
        yield served_weights(
            "milonga_refine_model", "The CLAP model that chooses among candidates.", model.scorer.model
        )


SERVICE: Final = Service(
    name=CAPTIONING.name,
    settings=CaptioningSettings,
    check=check,
    load=load,
    add=add_captioning,
    watch=lambda loaded, on_failure: loaded.worker.batcher.watch(on_failure),
    describe=describe,
    close=lambda loaded: loaded.close(),
)
