"""What Prometheus sees of the engine: its own counts, read at each scrape."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.generation.slot import EngineSlot

COUNTERS: dict[str, tuple[str, str]] = {
    "calls": ("milonga_denoiser_calls", "Calls of the denoiser, each one step of a batch."),
    "clip_steps": ("milonga_denoising_steps", "Denoising steps, summed over clips."),
    "rows": ("milonga_denoiser_rows", "Rows computed in denoiser calls, padding included."),
    "padding_rows": ("milonga_denoiser_padding_rows", "Rows computed for nobody."),
    "denoise_seconds": ("milonga_denoise_seconds", "Time in denoising steps."),
    "decode_seconds": ("milonga_decode_seconds", "Time in decoding clips."),
    "clips": ("milonga_clips", "Clips made."),
    "audio_seconds": ("milonga_audio_seconds", "Seconds of sound made."),
}
"""Field of `EngineStats` to name and help of its counter."""

OUTCOMES = ("finished", "cancelled", "expired", "failed")
"""Fields of `EngineStats` that count ended requests."""


class EngineCollector(Collector):
    """Reads the statistics of a slot's engines when it is scraped."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the engine and the model."""
        stats = self._slot.stats
        yield GaugeMetricFamily(
            "milonga_queue_depth", "Clips that wait for a place in the batch.", stats.queue_depth
        )
        yield GaugeMetricFamily(
            "milonga_running", "Requests in the engine, waiting ones included.", stats.running
        )
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(stats, field))
        ended = CounterMetricFamily("milonga_engine_requests", "Requests that ended.", labels=["outcome"])
        for outcome in OUTCOMES:
            ended.add_metric([outcome], getattr(stats, outcome))
        yield ended
        model = self._slot.current.version
        identity = {"name": model.name, "version": model.version, "digest": model.digest}
        yield InfoMetricFamily("milonga_model", "The served weights.", identity)
