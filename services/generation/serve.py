"""Start the generation service: settings, model, engine, server, and the drain at the end."""

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog
from pydantic import Field, SecretStr

from milonga.v1 import generation_pb2_grpc, operator_pb2_grpc
from services.environment import quiet_libraries
from services.errors import FieldViolation, InvalidInputError
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.model_uri import ModelURI, ResolvedModel, resolve, served_uri
from services.runtime.server import Server
from services.runtime.serving import serve
from services.runtime.settings import ServerSettings

if TYPE_CHECKING:
    from services.engine import Engine, EngineConfig
    from services.generation.slot import EngineSlot

log = structlog.get_logger()


class GenerationSettings(ServerSettings):
    """Settings of the generation service."""

    model: str = ""
    """Model URI, best with a pin. Empty: there is no pin, and without `unpinned_model` nothing is served: a
    service must not fall back to other weights by itself."""
    unpinned_model: str = ""
    """Model URI of what is served while `model` is empty: for a first start, never in production."""
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
    operator_token_file: Path | None = None
    """File with the token of the operator rpc, which switches models. None: off, without `operator_token`."""
    operator_token: SecretStr | None = None
    """The token itself, where there is no file: from the environment, never a flag that others can list."""


def run(settings: GenerationSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MilongaError: the service could not start: a setting, the port, the model.
    """
    uri = served_uri(settings.model, settings.unpinned_model)
    token = _operator_token(settings)
    quiet_libraries(online=uri.needs_network)
    configure_logs(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(
        serve(
            settings,
            load=lambda: _load(settings, uri),
            add=lambda server, metrics, slot: add_generation(server, metrics, slot, token),
            describe=_describe,
            close=lambda slot: slot.close(),
        )
    )


def add_generation(server: Server, metrics: ServerMetrics, slot: "EngineSlot", token: str | None) -> None:
    """Add the services of a slot, and its metrics, to a server; the operator's where there is a `token`."""
    from services.generation import operator, servicer
    from services.generation.inference import SlotOperator, TangoModel
    from services.generation.metrics import EngineCollector
    from services.runtime.inference import add_inference

    metrics.registry.register(EngineCollector(slot))
    generation = servicer.GenerationServicer(slot)
    server.add(
        servicer.SERVICE_NAME,
        lambda to: generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, to),
    )
    if token is not None:
        switching = operator.OperatorServicer(slot, token)
        server.add(
            operator.SERVICE_NAME,
            lambda to: operator_pb2_grpc.add_OperatorServiceServicer_to_server(switching, to),
        )
    add_inference(server, TangoModel(slot), None if token is None else SlotOperator(slot, token))


def _load(settings: GenerationSettings, uri: ModelURI) -> "EngineSlot":
    model = resolve(uri)
    # Only now: torch takes seconds to import, and a wrong setting should be known at once.
    from services.generation.slot import EngineSlot, Served

    return EngineSlot(Served(load_engine(settings, model), model), partial(load_engine, settings))


def load_engine(settings: GenerationSettings, model: ResolvedModel) -> "Engine":
    """Load the engine of a model that was found. Raises `ModelError` and `InvalidInputError`."""
    from services.engine import Engine
    from services.models.loading import load_tango

    config = _engine_config(settings)
    return Engine(load_tango(model.folder, device=settings.device, dtype=settings.dtype), config)


def _describe(slot: "EngineSlot") -> dict[str, Any]:
    model = slot.current.version
    return {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "folder": str(slot.current.folder),
    }


def _operator_token(settings: GenerationSettings) -> str | None:
    """The operator's token; None where there is none, and so no operator.

    Raises:
        InvalidInputError: the file can't be read, or what is given is no token.
    """
    field, token = "operator_token", settings.operator_token
    text = "" if token is None else token.get_secret_value()
    if settings.operator_token_file is not None:
        field, path = "operator_token_file", settings.operator_token_file
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise InvalidInputError(
                FieldViolation(field, f"is {path}, which can't be read: {reason}")
            ) from error
    elif not text:
        return None
    text = text.strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidInputError(
            FieldViolation(field, "holds no token: give one line of printable ASCII without spaces")
        )
    return text


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
