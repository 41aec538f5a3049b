"""The explanation service's `SERVICE`, which `services.runtime.serving` runs, and its Prometheus metrics."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from milonga.v1 import explanation_pb2_grpc as rpc
from services.catalogue import EXPLANATION
from services.explanation.settings import ExplanationSettings, model_uris
from services.runtime.metrics import ServerMetrics, counters, served_weights
from services.runtime.server import Server
from services.runtime.serving import Service
from services.weights.uri import resolve

if TYPE_CHECKING:
    from services.explanation.worker import ExplanationWorker

COUNTERS: Final = {
    "items": ("milonga_explanations", "Explanations that ended, those that were cancelled included."),
    "seconds": ("milonga_explanation_seconds", "Time in explanations."),
}
"""Fields of `BatchStats`, each with its counter's name and help."""


def check(settings: ExplanationSettings) -> bool:
    """See `Service.check`."""
    return any(uri.needs_network for uri in model_uris(settings).values())


def load(settings: ExplanationSettings) -> "ExplanationWorker":
    """Load the model that `settings` names. Raises `MilongaError`."""
    found = {name: resolve(uri) for name, uri in model_uris(settings).items()}
    # Imported last: importing torch takes seconds, and a wrong setting or model should be refused at once.
    from services.explanation import loading

    return loading.load(settings, found)


def add_explanation(
    server: Server, metrics: ServerMetrics, worker: "ExplanationWorker", settings: ExplanationSettings
) -> None:
    """Add ExplanationService, the Open Inference Protocol and the metrics of the worker to a server."""
    from services.explanation.inference import ExplanationInference
    from services.explanation.servicer import SERVICE_NAME, ExplanationServicer
    from services.inference import INFER, add_inference

    servicer = ExplanationServicer(worker)
    metrics.add(partial(collect, worker))
    worker.batcher.observe = metrics.observer("explanations", "queue_wait", "batch", "fill")
    server.add(SERVICE_NAME, lambda to: rpc.add_ExplanationServiceServicer_to_server(servicer, to))
    add_inference(server, ExplanationInference(servicer))
    server.gate.add((f"/{SERVICE_NAME}/ExplainAudio", INFER), partial(worker.batcher.expect, 1))


def describe(worker: "ExplanationWorker") -> dict[str, Any]:
    """See `Service.describe`."""
    return {
        "model": worker.version.name,
        "version": worker.version.version,
        "digest": worker.version.digest,
        "folder": str(worker.folder),
        "methods": ",".join(worker.description.methods),
    }


def collect(worker: "ExplanationWorker") -> Iterator[Metric]:
    """Yield the metrics of a worker and of its weights."""
    yield GaugeMetricFamily(
        "milonga_explanation_queue_depth", "Calls that wait.", worker.batcher.stats.queue_cost
    )
    yield from counters(COUNTERS, worker.batcher.stats)
    yield served_weights("milonga_model", "The served weights.", worker.version)


SERVICE: Final = Service(
    name=EXPLANATION.name,
    settings=ExplanationSettings,
    check=check,
    load=load,
    add=add_explanation,
    watch=lambda worker, on_failure: worker.batcher.watch(on_failure),
    describe=describe,
    close=lambda worker: worker.batcher.close(),
)
