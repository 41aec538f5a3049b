"""Start the generation service: settings, model, engine, server, and the drain at the end."""

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import structlog
from pydantic import Field

from milonga.v1 import generation_pb2_grpc as rpc
from services.environment import quiet_libraries
from services.errors import FieldViolation, InvalidInputError
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.model_uri import ModelURI, ResolvedModel, resolve
from services.runtime.server import Server
from services.runtime.serving import serve
from services.runtime.settings import ServerSettings

if TYPE_CHECKING:
    from services.engine import Engine, EngineConfig

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
    asyncio.run(
        serve(settings, load=lambda: _load(settings, uri), add=_add, describe=_describe, close=_close)
    )


def _load(settings: GenerationSettings, uri: ModelURI) -> "tuple[Engine, ResolvedModel]":
    model = resolve(uri)
    # Only now: torch takes seconds to import, and a wrong setting should be known at once.
    from services.engine import Engine
    from services.models.loading import load_tango

    config = _engine_config(settings)
    pipeline = load_tango(model.folder, device=settings.device, dtype=settings.dtype)
    return Engine(pipeline, config), model


def _add(server: Server, metrics: ServerMetrics, loaded: "tuple[Engine, ResolvedModel]") -> None:
    from services.generation.metrics import EngineCollector
    from services.generation.servicer import SERVICE_NAME, GenerationServicer

    servicer = GenerationServicer(*loaded)
    metrics.registry.register(EngineCollector(*loaded))
    server.add(
        SERVICE_NAME, lambda grpc_server: rpc.add_GenerationServiceServicer_to_server(servicer, grpc_server)
    )


async def _close(loaded: "tuple[Engine, ResolvedModel]") -> None:
    await asyncio.to_thread(loaded[0].close, 0.0)


def _describe(loaded: "tuple[Engine, ResolvedModel]") -> dict[str, Any]:
    model = loaded[1]
    return {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "folder": str(model.folder),
    }


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
