"""A real server in the test's process, on a thread of its own, and a real (tiny) model behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from milonga.v1 import explanation_pb2_grpc as rpc
from services.api.explanation import Explainer
from services.api.model import ModelVersion
from services.explanation.serve import SERVICE
from services.explanation.settings import ExplanationSettings
from services.explanation.worker import ExplanationWorker
from services.models.architectures import ARCHITECTURES
from services.models.explaining.explainer import DiffusionExplainer
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import load_settings
from tests.services.hosting import hosting
from tests.tiny import tiny_pipeline

MODEL = ModelVersion(name="tiny", version="2", digest="sha256:" + "1" * 64, license="Apache-2.0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    target: str
    stub: rpc.ExplanationServiceStub
    worker: ExplanationWorker
    metrics: ServerMetrics
    server: Server


def tiny_explainer() -> DiffusionExplainer:
    """Of the tiny pipeline with random weights."""
    return DiffusionExplainer(tiny_pipeline(), ARCHITECTURES["TangoPipeline"])


@contextmanager
def serving(explainer: Explainer, **settings: Any) -> Iterator[Served]:
    """Serve a model on a free port until the end of the context."""
    flags = {"listen": "127.0.0.1:0", "model": "tiny", "threads": 1, "grace_seconds": 0, **settings}
    config = load_settings(ExplanationSettings, **flags)
    worker = ExplanationWorker(explainer, MODEL, Path("tiny"), config)
    options = (("grpc.max_receive_message_length", -1),)
    with (
        hosting(SERVICE, worker, config) as hosted,
        grpc.insecure_channel(hosted.target, options=options) as channel,
    ):
        stub = rpc.ExplanationServiceStub(channel)
        yield Served(
            target=hosted.target, stub=stub, worker=worker, metrics=hosted.metrics, server=hosted.server
        )
