"""The scoring service's `SERVICE`, which `services.runtime.serving` runs, and its Prometheus metrics."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from milonga.v1 import scoring_pb2_grpc as rpc
from services.catalogue import SCORING
from services.runtime.metrics import ServerMetrics, identity
from services.runtime.server import Server
from services.runtime.serving import Service
from services.scoring.settings import ScoringSettings, find_models, model_uris

if TYPE_CHECKING:
    from services.scoring.scorers import Scorer

COUNTERS: "Final[Mapping[str, tuple[str, Callable[[Scorer], float]]]]" = {
    "milonga_scoring_clips": ("Clips embedded.", lambda scorer: scorer.audio.stats.items),
    "milonga_scoring_audio_calls": (
        "Calls of the audio encoder, each one batch.",
        lambda scorer: scorer.audio.stats.calls,
    ),
    "milonga_scoring_audio_seconds": (
        "Seconds of audio embedded, in whole windows.",
        lambda scorer: scorer.audio.stats.cost,
    ),
    "milonga_scoring_texts": (
        "Prompts embedded, or found in the cache.",
        lambda scorer: scorer.text.stats.items,
    ),
    "milonga_scoring_text_calls": (
        "Calls of the text encoder, each one batch.",
        lambda scorer: scorer.text.stats.calls,
    ),
    "milonga_scoring_text_cache_hits": (
        "Prompts whose embedding was cached.",
        lambda scorer: scorer.cache.hits,
    ),
    "milonga_scoring_text_cache_misses": (
        "Prompts whose embedding was not cached.",
        lambda scorer: scorer.cache.misses,
    ),
}
"""Counters by name: help, and function that reads the value."""


def check(settings: ScoringSettings) -> bool:
    """See `Service.check`."""
    return any(uri.needs_network for uri in model_uris(settings).values())


def load(settings: ScoringSettings) -> "dict[str, Scorer]":
    """Load the scorers that `settings` names. Raises `MilongaError`."""
    found = find_models(settings)
    # Imported last: importing torch takes seconds, and a wrong setting or model should be refused at once.
    from services.scoring import scorers

    return scorers.load(settings, found)


def add_scoring(
    server: Server, metrics: ServerMetrics, scorers: "Mapping[str, Scorer]", settings: ScoringSettings
) -> None:
    """Add ScoringService, the Open Inference Protocol and the metrics of `scorers` to a server."""
    from services.inference import INFER, add_inference
    from services.scoring.inference import ScoringInference
    from services.scoring.scorers import ScorerGroup
    from services.scoring.servicer import SERVICE_NAME, ScoringServicer

    servicer = ScoringServicer(scorers, settings)
    metrics.add(partial(collect, scorers))
    for scorer, name in _first_names(scorers).items():
        for part, batcher in (("audio", scorer.audio), ("text", scorer.text)):
            batcher.observe = metrics.observer(f"{name}/{part}", "queue_wait", "batch", "fill")
    server.add(SERVICE_NAME, lambda to: rpc.add_ScoringServiceServicer_to_server(servicer, to))
    add_inference(server, ScoringInference(servicer))
    rpcs = (f"/{SERVICE_NAME}/{rpc}" for rpc in ("BatchScoreAudio", "BatchEmbedAudio"))
    server.gate.add((*rpcs, INFER), partial(ScorerGroup(scorers).expect, 1, any_of_them=True))


def describe(scorers: "Mapping[str, Scorer]") -> dict[str, Any]:
    """See `Service.describe`."""
    versions = {name: scorer.version for name, scorer in scorers.items()}
    return {"scorers": {name: {"model": v.name, "digest": v.digest} for name, v in versions.items()}}


def watch(scorers: "Mapping[str, Scorer]", on_failure: Callable[[str], None]) -> None:
    """See `Service.watch`."""
    for scorer in scorers.values():
        scorer.watch(on_failure)


async def close(scorers: "Mapping[str, Scorer]") -> None:
    """Close each scorer once; names may share one."""
    for scorer in dict.fromkeys(scorers.values()):
        await scorer.close()


def collect(scorers: "Mapping[str, Scorer]") -> Iterator[Metric]:
    """Yield the metrics of every scorer. A scorer with several names is reported once, under the first."""
    first = _first_names(scorers)
    queue = GaugeMetricFamily(
        "milonga_scoring_queue_seconds", "Seconds of audio in the queue.", labels=["scorer"]
    )
    for scorer, name in first.items():
        queue.add_metric([name], scorer.audio.stats.queue_cost)
    yield queue
    for metric, (text, read) in COUNTERS.items():
        counter = CounterMetricFamily(metric, text, labels=["scorer"])
        for scorer, name in first.items():
            counter.add_metric([name], read(scorer))
        yield counter
    served = InfoMetricFamily("milonga_model", "The served weights.", labels=["scorer"])
    for name, scorer in scorers.items():
        served.add_metric([name], identity(scorer.version))
    yield served


def _first_names(scorers: "Mapping[str, Scorer]") -> "dict[Scorer, str]":
    first: dict[Scorer, str] = {}
    for name, scorer in scorers.items():
        first.setdefault(scorer, name)
    return first


SERVICE: Final = Service(
    name=SCORING.name,
    settings=ScoringSettings,
    check=check,
    load=load,
    add=add_scoring,
    watch=watch,
    describe=describe,
    close=close,
)
