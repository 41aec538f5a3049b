"""Start the generation service: settings, model, engine, server, and the drain at the end."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from milonga.v1 import generation_pb2_grpc, operator_pb2_grpc
from services.environment import quiet_libraries
from services.errors import FieldViolation, InvalidInputError
from services.generation.settings import GenerationSettings
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.serving import serve
from services.weights.uri import ModelURI, resolve, served_uri

if TYPE_CHECKING:
    from services.generation.slot import EngineSlot

log = structlog.get_logger()


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
    from services.inference import add_inference

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
    from services.generation.slot import EngineSlot, Served, load_engine

    return EngineSlot(Served(load_engine(settings, model), model.folder), partial(load_engine, settings))


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
