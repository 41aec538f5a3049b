"""What Prometheus sees of the judge: its own counts, read at each scrape."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.reward.judge import Judge

COUNTERS: dict[str, tuple[str, str]] = {
    "items": ("milonga_reward_clips", "Clips judged."),
    "calls": ("milonga_reward_calls", "Calls of the model, each one batch."),
    "cost": ("milonga_reward_audio_seconds", "Seconds of sound judged, in whole windows."),
    "seconds": ("milonga_reward_busy_seconds", "Time in calls of the model."),
    "waited": ("milonga_reward_wait_seconds", "Time that clips stood in the queue, summed over clips."),
    "refused": ("milonga_reward_refused", "Submissions that found the queue full."),
}
"""Field of `BatchStats` to name and help of its counter."""


class RewardCollector(Collector):
    """Reads a judge's statistics when it is scraped."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the judge and its models."""
        stats = self._judge.stats
        yield GaugeMetricFamily(
            "milonga_reward_queue_seconds", "Seconds of sound that wait.", stats.queue_cost
        )
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(stats, field))
        served = (
            ("milonga_model", "The served weights.", self._judge.version),
            ("milonga_clap_model", "The CLAP model that they stand on.", self._judge.clap),
        )
        for name, text, version in served:
            identity = {"name": version.name, "version": version.version, "digest": version.digest}
            yield InfoMetricFamily(name, text, identity)
