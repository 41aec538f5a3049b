"""What Prometheus sees of the scorers: their own counts, read at each scrape."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.scoring.scorers import Scorer

COUNTERS: dict[str, tuple[str, Callable[[Scorer], float]]] = {
    "milonga_scoring_clips": ("Clips embedded.", lambda scorer: scorer.audio_stats.items),
    "milonga_scoring_audio_calls": (
        "Calls of the model's audio side, each one batch.",
        lambda scorer: scorer.audio_stats.calls,
    ),
    "milonga_scoring_audio_seconds": (
        "Seconds of sound embedded, in whole windows.",
        lambda scorer: scorer.audio_stats.cost,
    ),
    "milonga_scoring_audio_busy_seconds": (
        "Time in calls of the audio side.",
        lambda scorer: scorer.audio_stats.seconds,
    ),
    "milonga_scoring_audio_wait_seconds": (
        "Time that clips stood in the queue, summed over clips.",
        lambda scorer: scorer.audio_stats.waited,
    ),
    "milonga_scoring_refused": (
        "Submissions that found the queue full.",
        lambda scorer: scorer.audio_stats.refused + scorer.text_stats.refused,
    ),
    "milonga_scoring_texts": ("Prompts embedded or found.", lambda scorer: scorer.text_stats.items),
    "milonga_scoring_text_calls": (
        "Calls of the model's text side, each one batch.",
        lambda scorer: scorer.text_stats.calls,
    ),
    "milonga_scoring_text_cache_hits": (
        "Prompts whose embedding was kept.",
        lambda scorer: scorer.cache.hits,
    ),
    "milonga_scoring_text_cache_misses": (
        "Prompts whose embedding was not.",
        lambda scorer: scorer.cache.misses,
    ),
}
"""Name of each counter to its help and where it is read."""


class ScoringCollector(Collector):
    """Reads the scorers' statistics when it is scraped. Names that share weights are one, under the first."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        first: dict[Scorer, str] = {}
        for name, scorer in scorers.items():
            first.setdefault(scorer, name)
        self._scorers = scorers
        self._distinct = {name: scorer for scorer, name in first.items()}

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of every scorer."""
        queue = GaugeMetricFamily(
            "milonga_scoring_queue_seconds", "Seconds of sound that wait.", labels=["scorer"]
        )
        for name, scorer in self._distinct.items():
            queue.add_metric([name], scorer.audio_stats.queue_cost)
        yield queue
        for metric, (text, read) in COUNTERS.items():
            counter = CounterMetricFamily(metric, text, labels=["scorer"])
            for name, scorer in self._distinct.items():
                counter.add_metric([name], read(scorer))
            yield counter
        served = InfoMetricFamily("milonga_model", "The served weights.", labels=["scorer"])
        for name, scorer in self._scorers.items():
            version = scorer.version
            served.add_metric(
                [name], {"name": version.name, "version": version.version, "digest": version.digest}
            )
        yield served
