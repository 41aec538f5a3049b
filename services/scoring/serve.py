"""Start the scoring service: settings, scorers, server, and the drain at the end."""

import asyncio
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import Field, field_validator

from milonga.v1 import scoring_pb2_grpc as rpc
from services.environment import quiet_libraries
from services.errors import FieldViolation, InvalidInputError
from services.runtime.clips import AudioBounds
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.model_uri import ModelURI
from services.runtime.server import Server
from services.runtime.serving import serve
from services.runtime.settings import ServerSettings

if TYPE_CHECKING:
    from services.scoring.scorers import Scorer

log = structlog.get_logger()

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ScoringSettings(ServerSettings):
    """Settings of the scoring service."""

    listen: str = "127.0.0.1:50052"
    """Address of the service: host:port (port 0: any free one), or unix:/path."""
    max_request_bytes: int = Field(default=256 * 2**20, gt=0, lt=2**31)
    """Largest message that is taken in: eleven minutes of stereo float32 at 48 kHz."""
    scorers: dict[str, str] = Field(default={}, validate_default=True)
    """Name of each scorer to its model URI, best with a pin. No default: a service must not fall back to
    other weights by itself."""
    device: str = "auto"
    """auto (cuda where there is one, otherwise cpu), cpu, cuda or cuda:N."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of the models; None: torch's choice."""
    max_batch_size: int = Field(default=64, gt=0)
    """Most clips, pairs or prompts of one call."""
    max_batch_seconds: float = Field(default=80.0, gt=0)
    """Seconds of sound in one batch of a model, in whole windows: what bounds its memory."""
    max_wait_seconds: float = Field(default=0.005, ge=0, le=60)
    """How long a clip or a prompt waits for companions of other calls."""
    max_queue_seconds: float = Field(default=3840.0, gt=0)
    """Seconds of sound that may wait for each model. Beyond that, RESOURCE_EXHAUSTED at once."""

    @field_validator("scorers")
    @classmethod
    def _check_scorers(cls, scorers: dict[str, str]) -> dict[str, str]:
        if not scorers:
            raise ValueError(
                'give at least one: --scorer NAME=URI, or MILONGA_SCORERS=\'{"a": "mini:clap-a"}\''
            )
        for name in scorers:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"the name {name[:80]!r} must be 1 to 64 letters, digits, underscores, dots and hyphens"
                )
        return scorers


def run(settings: ScoringSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MilongaError: the service could not start: a setting, the port, a model.
    """
    uris = _uris(settings.scorers)
    quiet_libraries(online=any(uri.needs_network for uri in uris.values()))
    configure_logs(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(
        serve(
            settings,
            load=lambda: load(settings),
            add=lambda server, metrics, scorers: add_scoring(server, metrics, scorers, settings),
            describe=_describe,
            close=close,
        )
    )


def add_scoring(
    server: Server, metrics: ServerMetrics, scorers: "Mapping[str, Scorer]", settings: ScoringSettings
) -> None:
    """Add the service of loaded scorers, and its metrics, to a server."""
    from services.runtime.inference import add_inference
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


def load(settings: ScoringSettings) -> "dict[str, Scorer]":
    """Load every scorer of the settings, by name."""
    # Only now: torch takes seconds to import, and a wrong setting should be known at once.
    from services.scoring.scorers import BatchConfig, load_scorers

    config = BatchConfig(
        max_batch_seconds=settings.max_batch_seconds,
        max_wait_seconds=settings.max_wait_seconds,
        max_queue_seconds=settings.max_queue_seconds,
        threads=settings.threads,
    )
    return load_scorers(_uris(settings.scorers), settings.device, config)


async def close(scorers: "Mapping[str, Scorer]") -> None:
    """Close each scorer once."""
    for scorer in dict.fromkeys(scorers.values()):
        await scorer.close()


def _uris(scorers: Mapping[str, str]) -> dict[str, ModelURI]:
    uris: dict[str, ModelURI] = {}
    faults: list[FieldViolation] = []
    for name, text in scorers.items():
        try:
            uris[name] = ModelURI.parse(text)
        except InvalidInputError as error:
            faults += [FieldViolation(f"scorers.{name}", fault.description) for fault in error.violations]
    if faults:
        raise InvalidInputError(*faults)
    return uris


def _describe(scorers: "Mapping[str, Scorer]") -> dict[str, Any]:
    versions = {name: scorer.version for name, scorer in scorers.items()}
    return {"scorers": {name: {"model": v.name, "digest": v.digest} for name, v in versions.items()}}
