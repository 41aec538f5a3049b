"""The metrics that real services expose after calls of every kind, by name."""

import queue
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import tritonclient.grpc as triton
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from milonga import AudioClient
from milonga.v1 import (
    audio_pb2,
    captioning_pb2,
    explanation_pb2,
    generation_pb2,
    reward_pb2,
    scoring_pb2,
    scoring_pb2_grpc,
)
from services.catalogue import CATALOGUE
from services.errors import MilongaError
from services.runtime.certificates import Certificates
from services.runtime.gpu_memory import GpuMemory, memory_metrics
from services.runtime.metrics import ServerMetrics
from services.runtime.settings import ServerSettings, load_settings
from tests.services.captioning.serving import serving as serving_captioning
from tests.services.explanation.serving import serving as serving_explanation
from tests.services.explanation.serving import tiny_explainer
from tests.services.generation.serving import serving as serving_generation
from tests.services.generation.serving import tiny_engine
from tests.services.inference.asking import tensor
from tests.services.reward.serving import float32, tone
from tests.services.reward.serving import serving as serving_reward
from tests.services.runtime.certificates import make_authority, make_identity
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as serving_scoring
from tests.tiny import tiny_captioner, tiny_clap, tiny_reward
from tests.waiting import until

PREFIXES: Final = ("milonga_", "process_")


@dataclass(kw_only=True, slots=True)
class Exposed:
    """A metric as a query names it: a counter with `_total`, a histogram without a suffix."""

    kind: str
    text: str
    labels: set[str]
    services: set[str]

    def samples(self, name: str) -> set[str]:
        """Names of its series."""
        suffixes = ("_bucket", "_count", "_sum") if self.kind == "histogram" else ("",)
        return {name + suffix for suffix in suffixes}


@cache
def exposed() -> dict[str, Exposed]:
    """Start each service, call it, and return what it exposes. A label has been seen in a sample."""
    found: dict[str, Exposed] = {}
    gpu = GpuMemory(device=0, allocated=1, peak=1, reserved=1, total=1)
    for service in CATALOGUE:
        _merge(found, service, memory_metrics([gpu]))
    with tempfile.TemporaryDirectory() as folder:
        for service, text in _texts(Path(folder)):
            _merge(found, service, text_string_to_metric_families(text))
    assert {service for one in found.values() for service in one.services} == set(CATALOGUE)
    return found


def _merge(found: dict[str, Exposed], service: str, families: Iterable[Metric]) -> None:
    for family in families:
        if not family.name.startswith(PREFIXES) or family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        known = found.setdefault(
            name, Exposed(kind=family.type, text=family.documentation, labels=set(), services=set())
        )
        assert (known.kind, known.text) == (family.type, family.documentation), name
        known.services.add(service)
        known.labels |= {label for sample in family.samples for label in sample.labels} - {"le"}


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each service and the text that Prometheus would scrape."""
    identity = make_identity(folder, "server", make_authority(folder, "authority"))
    with_tls = ServerMetrics()
    flags: Any = {"tls_cert_file": identity.cert_file, "tls_key_file": identity.key_file}
    Certificates(load_settings(ServerSettings, **flags), with_tls)
    for service in CATALOGUE:
        yield service, generate_latest(with_tls.registry).decode()
    with _generation() as metrics:
        yield "generation", generate_latest(metrics.registry).decode()
    with serving_scoring({"a": f"file:{save_tiny_clap(folder / 'clap', 1)}"}) as scoring:
        with grpc.insecure_channel(scoring.hosted.target) as channel:
            stub = scoring_pb2_grpc.ScoringServiceStub(channel)
            pair = audio_pb2.PromptedClip(prompt="rain", clip=float32(tone()))
            stub.BatchScoreAudio(scoring_pb2.BatchScoreAudioRequest(pairs=[pair]))
        yield "scoring", generate_latest(scoring.hosted.metrics.registry).decode()
    with serving_reward(tiny_reward(tiny_clap())) as reward:
        reward.stub.BatchComputeRewards(reward_pb2.BatchComputeRewardsRequest(pairs=[pair]))
        yield "reward", generate_latest(reward.metrics.registry).decode()
    with serving_captioning(tiny_captioner(), tiny_clap()) as captioning:
        captioning.stub.CaptionAudio(captioning_pb2.CaptionAudioRequest(clips=[float32(tone())]))
        yield "captioning", generate_latest(captioning.metrics.registry).decode()
    with serving_explanation(tiny_explainer()) as explanation:
        request = generation_pb2.GenerateAudioRequest(prompt="a dog barks", num_inference_steps=1)
        list(explanation.stub.ExplainAudio(explanation_pb2.ExplainAudioRequest(request=request)))
        yield "explanation", generate_latest(explanation.metrics.registry).decode()


@contextmanager
def _generation() -> Iterator[ServerMetrics]:
    """Make a clip, refuse a message, and answer a request in a stream."""
    with (
        tiny_engine() as engine,
        serving_generation(engine, max_request_bytes=10_000) as served,
        AudioClient(served.target, retries=0) as client,
        triton.InferenceServerClient(served.target) as streaming,
    ):
        client.generate("rain", duration=0.64, num_inference_steps=2, timeout=60.0)
        with pytest.raises(MilongaError):
            client.generate("a" * 10_001)
        answers: queue.Queue[Any] = queue.Queue()
        streaming.start_stream(lambda result, error: answers.put(error))
        streaming.async_stream_infer("tango", [tensor("PROMPT", "BYTES", [b""])])
        assert answers.get(timeout=60) is not None
        streaming.stop_stream()
        for name in (
            b"milonga_stream_requests_total{",
            b"milonga_refusals_total{",
        ):  # counted after the answer
            until(lambda name=name: name in generate_latest(served.metrics.registry))  # type: ignore[misc]
        yield served.metrics
