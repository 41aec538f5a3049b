"""Start the generation service: settings, model, engine, server, and the drain at the end."""

import asyncio
import time
from typing import TYPE_CHECKING, Literal

import structlog
from pydantic import Field

from milonga.v1 import generation_pb2_grpc as rpc
from services.environment import quiet_libraries
from services.errors import FieldViolation, InvalidInputError
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.model_uri import ModelURI, ResolvedModel, resolve
from services.runtime.server import Server
from services.runtime.settings import ServerSettings

if TYPE_CHECKING:
    from services.engine import EngineConfig

log = structlog.get_logger()


class GenerationSettings(ServerSettings):
    """Settings of the generation service."""

    model: str
    """Model URI, best with a pin. No default: a service must not fall back to other weights by itself."""
    device: str = "auto"
    """auto (cuda where there is one, otherwise cpu), cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of text encoder and denoiser; autoencoder and vocoder stay in float32."""
    batch_shapes: tuple[int, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    """Clips that a denoiser call may hold, ascending; calls are padded to the smallest that fits."""
    exact: bool = False
    """Always pad to the largest batch shape: the same clip bit for bit, whoever else is served. Slower."""
    max_queue: int = Field(default=64, gt=0)
    """Clips that may wait. Beyond that, RESOURCE_EXHAUSTED at once."""
    max_clip_count: int = Field(default=8, gt=0)
    """Most clips in one request; never more than `max_queue`."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of the model; None: torch's choice."""


def run(settings: GenerationSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MilongaError: the service could not start: a setting, the port, the model.
    """
    uri = ModelURI.parse(settings.model)
    quiet_libraries(online=uri.needs_network)
    configure_logs(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(_serve(settings, uri))


async def _serve(settings: GenerationSettings, uri: ModelURI) -> None:
    start = time.monotonic()
    metrics = ServerMetrics()
    server = Server(settings, metrics)
    try:
        model = await asyncio.to_thread(resolve, uri)
        # Only now: torch takes seconds to import, and a wrong setting should be known at once.
        from services.engine import Engine
        from services.generation.metrics import EngineCollector
        from services.generation.servicer import SERVICE_NAME, GenerationServicer
        from services.models.loading import load_tango

        config = _engine_config(settings)
        pipeline = await asyncio.to_thread(
            load_tango, model.folder, device=settings.device, dtype=settings.dtype
        )
        engine = Engine(pipeline, config)
    except BaseException:
        await server.stop(0)
        raise
    servicer = GenerationServicer(engine, model)
    metrics.registry.register(EngineCollector(engine, model))
    server.add(
        SERVICE_NAME, lambda grpc_server: rpc.add_GenerationServiceServicer_to_server(servicer, grpc_server)
    )
    try:
        await server.start()
        _log_ready(settings, server, model, time.monotonic() - start)
        await server.serve_until_signal()
    finally:
        # Every call has ended by now, or had its grace.
        await asyncio.to_thread(engine.close, 0.0)
    log.info("stopped")


def _engine_config(settings: GenerationSettings) -> "EngineConfig":
    from services.engine import EngineConfig

    try:
        return EngineConfig(
            batch_shapes=settings.batch_shapes,
            max_queue=settings.max_queue,
            max_clip_count=min(settings.max_clip_count, settings.max_queue),
            exact=settings.exact,
            threads=settings.threads,
        )
    except ValueError as error:
        raise InvalidInputError(FieldViolation("settings", str(error))) from error


def _log_ready(settings: GenerationSettings, server: Server, model: ResolvedModel, seconds: float) -> None:
    log.info(
        "ready",
        listen=settings.listen,
        port=server.port,
        tls=settings.tls_cert_file is not None,
        health_port=server.health_port,
        metrics_port=server.metrics_port,
        model=model.name,
        version=model.version,
        digest=model.digest,
        folder=str(model.folder),
        seconds=round(seconds, 2),
    )
