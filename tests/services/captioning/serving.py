"""A real server in the test's process, on a thread of its own, and real (tiny) models behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from milonga.v1 import captioning_pb2_grpc as rpc
from services.api.model import ModelVersion
from services.captioning.loading import LoadedCaptioner, connect
from services.captioning.model import CaptionModel, scorer_of
from services.captioning.serve import SERVICE
from services.captioning.settings import CLAP, CaptioningSettings
from services.captioning.worker import CaptionWorker
from services.models.captioner.model import Captioner
from services.models.clap.model import ClapModel
from services.models.manifest import write_manifest
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import load_settings
from services.weights.uri import ResolvedModel
from tests.services.hosting import hosting
from tests.tiny import tiny_captioner, tiny_clap

MODEL = ModelVersion(name="tiny", version="2", digest="sha256:" + "1" * 64, license="Apache-2.0")
CLAP_MODEL = ResolvedModel(
    folder=Path("clap"),
    identity=ModelVersion(name="tiny-clap", version="1", digest="sha256:" + "0" * 64, license="Apache-2.0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    target: str
    stub: rpc.CaptioningServiceStub
    worker: CaptionWorker
    metrics: ServerMetrics
    server: Server


@contextmanager
def serving(captioner: Captioner, clap: ClapModel | None = None, **settings: Any) -> Iterator[Served]:
    """Serve models on a free port until the end of the context."""
    flags = {"listen": "127.0.0.1:0", "model": "tiny", "threads": 1, "grace_seconds": 0, **settings}
    config = load_settings(CaptioningSettings, **flags)
    refiner = connect(config)
    scorer = None if clap is None else scorer_of(clap, CLAP_MODEL, CLAP)
    model = CaptionModel(captioner, MODEL, clap=clap, scorer=scorer, sends=refiner is not None)
    worker = CaptionWorker(model, Path("tiny"), config)
    options = (("grpc.max_send_message_length", -1),)
    with (
        hosting(SERVICE, LoadedCaptioner(worker=worker, refiner=refiner), config) as hosted,
        grpc.insecure_channel(hosted.target, options=options) as channel,
    ):
        stub = rpc.CaptioningServiceStub(channel)
        yield Served(
            target=hosted.target, stub=stub, worker=worker, metrics=hosted.metrics, server=hosted.server
        )


def write_models(folder: Path) -> tuple[Path, Path]:
    """Save a tiny captioner and a tiny CLAP model. Returns their folders."""
    captioner, clap = folder / "captioner", folder / "clap"
    tiny_captioner().save_pretrained(captioner)
    write_manifest(captioner, name="tiny-captioner", version="2", license="Apache-2.0")
    tiny_clap().save(clap)
    write_manifest(clap, name="tiny-clap", version="1", license="Apache-2.0")
    return captioner, clap
