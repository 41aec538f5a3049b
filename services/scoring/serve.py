"""Start the scoring service: settings, scorers, server, and the drain at the end."""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from milonga.v1 import scoring_pb2_grpc as rpc
from services.audio.clips import AudioBounds
from services.environment import quiet_libraries
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.serving import serve
from services.scoring.settings import ScoringSettings, model_uris

if TYPE_CHECKING:
    from services.scoring.scorers import Scorer

log = structlog.get_logger()


def run(settings: ScoringSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MilongaError: the service could not start: a setting, the port, a model.
    """
    uris = model_uris(settings.scorers)
    quiet_libraries(online=any(uri.needs_network for uri in uris.values()))
    configure_logs(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(
        serve(
            settings,
            load=lambda: _load(settings),
            add=lambda server, metrics, scorers: add_scoring(server, metrics, scorers, settings),
            describe=_describe,
            close=_close,
        )
    )


def add_scoring(
    server: Server, metrics: ServerMetrics, scorers: "Mapping[str, Scorer]", settings: ScoringSettings
) -> None:
    """Add the service of loaded scorers, and its metrics, to a server."""
    from services.inference import add_inference
    from services.scoring.inference import ClapModel
    from services.scoring.metrics import ScoringCollector
    from services.scoring.servicer import SERVICE_NAME, ScoringServicer

    bounds = AudioBounds(max_batch_size=settings.max_batch_size)
    servicer = ScoringServicer(scorers, bounds, max_request_bytes=settings.max_request_bytes)
    metrics.registry.register(ScoringCollector(scorers))
    server.add(
        SERVICE_NAME, lambda grpc_server: rpc.add_ScoringServiceServicer_to_server(servicer, grpc_server)
    )
    add_inference(server, ClapModel(servicer, scorers, bounds))


def _load(settings: ScoringSettings) -> "dict[str, Scorer]":
    # Only now: torch takes seconds to import, and a wrong setting should be known at once.
    from services.scoring.scorers import load

    return load(settings)


def _describe(scorers: "Mapping[str, Scorer]") -> dict[str, Any]:
    versions = {name: scorer.version for name, scorer in scorers.items()}
    return {"scorers": {name: {"model": v.name, "digest": v.digest} for name, v in versions.items()}}


async def _close(scorers: "Mapping[str, Scorer]") -> None:
    from services.scoring.scorers import close

    await close(scorers)
