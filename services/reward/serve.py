"""The reward service's `SERVICE`, which `services.runtime.serving` runs, and its Prometheus metrics."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from milonga.v1 import reward_pb2_grpc as rpc
from services.catalogue import REWARD
from services.reward.settings import RewardSettings, find_models, model_uris
from services.runtime.metrics import ServerMetrics, counters, served_weights
from services.runtime.server import Server
from services.runtime.serving import Service

if TYPE_CHECKING:
    from services.reward.model import RewardScorer

COUNTERS: Final = {
    "items": ("milonga_reward_clips", "Clips evaluated."),
    "calls": ("milonga_reward_calls", "Calls of the model, each one batch."),
    "cost": ("milonga_reward_audio_seconds", "Seconds of audio evaluated, in whole windows."),
}
"""Fields of `BatchStats`, each with its counter's name and help."""


def check(settings: RewardSettings) -> bool:
    """See `Service.check`."""
    return any(uri.needs_network for uri in model_uris(settings).values())


def load(settings: RewardSettings) -> "RewardScorer":
    """Load the models that `settings` names. Raises `MilongaError`."""
    found = find_models(settings)
    # Imported last: importing torch takes seconds, and a wrong setting or model should be refused at once.
    from services.reward import model

    return model.load(settings, found)


def add_reward(
    server: Server, metrics: ServerMetrics, scorer: "RewardScorer", settings: RewardSettings
) -> None:
    """Add RewardService, the Open Inference Protocol and the metrics of `scorer` to a server."""
    from services.inference import INFER, add_inference
    from services.reward.inference import RewardInference
    from services.reward.servicer import SERVICE_NAME, RewardServicer

    servicer = RewardServicer(scorer, settings)
    metrics.add(partial(collect, scorer))
    scorer.batcher.observe = metrics.observer("pairs", "queue_wait", "batch", "fill")
    server.add(SERVICE_NAME, lambda to: rpc.add_RewardServiceServicer_to_server(servicer, to))
    add_inference(server, RewardInference(servicer))
    rpcs = (f"/{SERVICE_NAME}/{rpc}" for rpc in ("BatchComputeRewards", "RankAudio"))
    server.gate.add((*rpcs, INFER), partial(scorer.batcher.expect, 1))


def describe(scorer: "RewardScorer") -> dict[str, Any]:
    """See `Service.describe`."""
    return {
        "model": scorer.version.name,
        "version": scorer.version.version,
        "digest": scorer.version.digest,
        "folder": str(scorer.folder),
        "clap": {"model": scorer.clap.name, "digest": scorer.clap.digest},
    }


def collect(scorer: "RewardScorer") -> Iterator[Metric]:
    """Yield the metrics of `scorer` and of its weights."""
    stats = scorer.batcher.stats
    yield GaugeMetricFamily(
        "milonga_reward_queue_seconds", "Seconds of audio in the queue.", stats.queue_cost
    )
    yield from counters(COUNTERS, stats)
    yield served_weights("milonga_model", "The served weights.", scorer.version)
    yield served_weights(
        "milonga_clap_model", "The CLAP model that the served weights were trained on.", scorer.clap
    )


SERVICE: Final = Service(
    name=REWARD.name,
    settings=RewardSettings,
    check=check,
    load=load,
    add=add_reward,
    watch=lambda scorer, on_failure: scorer.batcher.watch(on_failure),
    describe=describe,
    close=lambda scorer: scorer.batcher.close(),
)
