"""Start the reward service: settings, judge, server, and the drain at the end."""

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from milonga.v1 import reward_pb2_grpc as rpc
from services.audio.clips import AudioBounds
from services.environment import quiet_libraries
from services.reward.settings import RewardSettings, model_uris
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.serving import serve

if TYPE_CHECKING:
    from services.reward.judge import Judge

log = structlog.get_logger()


def run(settings: RewardSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MilongaError: the service could not start: a setting, the port, a model.
    """
    quiet_libraries(online=any(uri.needs_network for uri in model_uris(settings)))
    configure_logs(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(
        serve(
            settings,
            load=lambda: _load(settings),
            add=lambda server, metrics, judge: add_reward(server, metrics, judge, settings),
            describe=_describe,
            close=lambda judge: judge.close(),
        )
    )


def add_reward(server: Server, metrics: ServerMetrics, judge: "Judge", settings: RewardSettings) -> None:
    """Add the service of a loaded judge, and its metrics, to a server."""
    from services.inference import add_inference
    from services.reward.inference import JudgeModel
    from services.reward.metrics import RewardCollector
    from services.reward.servicer import SERVICE_NAME, RewardServicer

    bounds = AudioBounds(max_batch_size=settings.max_batch_size)
    servicer = RewardServicer(judge, bounds, max_request_bytes=settings.max_request_bytes)
    metrics.registry.register(RewardCollector(judge))
    server.add(
        SERVICE_NAME, lambda grpc_server: rpc.add_RewardServiceServicer_to_server(servicer, grpc_server)
    )
    add_inference(server, JudgeModel(servicer, judge, bounds))


def _load(settings: RewardSettings) -> "Judge":
    # Only now: torch takes seconds to import, and a wrong setting should be known at once.
    from services.reward.judge import load

    return load(settings)


def _describe(judge: "Judge") -> dict[str, Any]:
    return {
        "model": judge.version.name,
        "version": judge.version.version,
        "digest": judge.version.digest,
        "folder": str(judge.folder),
        "clap": {"model": judge.clap.name, "digest": judge.clap.digest},
    }
