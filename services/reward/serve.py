"""What `services.runtime.serving` runs as the reward service, and what Prometheus sees of it."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from milonga.v1 import reward_pb2_grpc as rpc
from services.reward.settings import RewardSettings, find_models, model_uris
from services.runtime.metrics import ServerMetrics, counters, served_weights
from services.runtime.server import Server
from services.runtime.serving import Service

if TYPE_CHECKING:
    from services.reward.judge import Judge

COUNTERS: Final = {
    "items": ("milonga_reward_clips", "Clips evaluated."),
    "calls": ("milonga_reward_calls", "Calls of the model, each one batch."),
    "cost": ("milonga_reward_audio_seconds", "Seconds of sound evaluated, in whole windows."),
    "seconds": ("milonga_reward_busy_seconds", "Time in calls of the model."),
    "waited": ("milonga_reward_wait_seconds", "Time that clips spent in the queue, summed over clips."),
    "refused": ("milonga_reward_refused", "Submissions that found the queue full."),
}
"""Field of `BatchStats` to name and help of its counter."""


def check(settings: RewardSettings) -> bool:
    """See `Service.check`."""
    return any(uri.needs_network for uri in model_uris(settings).values())


def load(settings: RewardSettings) -> "Judge":
    """Load the models that the settings name. Raises `MilongaError`."""
    found = find_models(settings)
    # Only now: torch takes seconds to import, and a wrong setting or model should be refused at once.
    from services.reward import judge

    return judge.load(settings, found)


def add_reward(server: Server, metrics: ServerMetrics, judge: "Judge", settings: RewardSettings) -> None:
    """Add the services of a loaded judge, and its metrics, to a server."""
    from services.inference import add_inference
    from services.reward.inference import JudgeModel
    from services.reward.servicer import SERVICE_NAME, RewardServicer

    servicer = RewardServicer(judge, settings)
    metrics.add(partial(collect, judge))
    server.add(SERVICE_NAME, lambda to: rpc.add_RewardServiceServicer_to_server(servicer, to))
    add_inference(server, JudgeModel(servicer))


def describe(judge: "Judge") -> dict[str, Any]:
    """See `Service.describe`."""
    return {
        "model": judge.version.name,
        "version": judge.version.version,
        "digest": judge.version.digest,
        "folder": str(judge.folder),
        "clap": {"model": judge.clap.name, "digest": judge.clap.digest},
    }


def collect(judge: "Judge") -> Iterator[Metric]:
    """Yield the metrics of a judge and of its weights."""
    stats = judge.stats
    yield GaugeMetricFamily("milonga_reward_queue_seconds", "Seconds of sound that wait.", stats.queue_cost)
    yield from counters(COUNTERS, stats)
    yield served_weights("milonga_model", "The served weights.", judge.version)
    yield served_weights("milonga_clap_model", "The CLAP model that they were trained on.", judge.clap)


SERVICE: Final = Service(
    settings=RewardSettings,
    check=check,
    load=load,
    add=add_reward,
    describe=describe,
    close=lambda judge: judge.close(),
)
