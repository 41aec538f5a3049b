"""Start the reward service: settings, judge, server, and the drain at the end."""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import Field

from milonga.v1 import reward_pb2_grpc as rpc
from services.environment import quiet_libraries
from services.errors import FieldViolation, InvalidInputError, ModelError
from services.runtime.clips import AudioBounds
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.model_uri import ModelURI, resolve
from services.runtime.server import Server
from services.runtime.serving import serve
from services.runtime.settings import ServerSettings

if TYPE_CHECKING:
    from services.reward.judge import Judge

log = structlog.get_logger()

FAMILY, MEMBER = "mini", "reward"
"""Where a service makes no sound, the name of the embedded family means this member."""


class RewardSettings(ServerSettings):
    """Settings of the reward service."""

    listen: str = "127.0.0.1:50053"
    """Address of the service: host:port (port 0: any free one), or unix:/path."""
    max_request_bytes: int = Field(default=256 * 2**20, gt=0, lt=2**31)
    """Largest message that is taken in: eleven minutes of stereo float32 at 48 kHz."""
    model: str
    """Model URI of the reward model, best with a pin; `mini` means mini:reward. No default: a service must
    not fall back to other weights by itself."""
    clap: str = "mini:clap-a"
    """Model URI of the CLAP model that the reward model was trained on; it refuses another."""
    device: str = "auto"
    """auto (cuda where there is one, otherwise cpu), cpu, cuda or cuda:N."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of the model; None: torch's choice."""
    max_batch_size: int = Field(default=64, gt=0)
    """Most clips or pairs of one call."""
    max_batch_seconds: float = Field(default=80.0, gt=0)
    """Seconds of sound in one batch of the model, in whole windows: what bounds its memory."""
    max_wait_seconds: float = Field(default=0.005, ge=0, le=60)
    """How long a clip waits for companions of other calls."""
    max_queue_seconds: float = Field(default=3840.0, gt=0)
    """Seconds of sound that may wait. Beyond that, RESOURCE_EXHAUSTED at once."""


def run(settings: RewardSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MilongaError: the service could not start: a setting, the port, a model.
    """
    quiet_libraries(online=any(uri.needs_network for uri in _uris(settings)))
    configure_logs(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(
        serve(
            settings,
            load=lambda: load(settings),
            add=lambda server, metrics, judge: add_reward(server, metrics, judge, settings),
            describe=_describe,
            close=lambda judge: judge.close(),
        )
    )


def add_reward(server: Server, metrics: ServerMetrics, judge: "Judge", settings: RewardSettings) -> None:
    """Add the service of a loaded judge, and its metrics, to a server."""
    from services.reward.inference import JudgeModel
    from services.reward.metrics import RewardCollector
    from services.reward.servicer import SERVICE_NAME, RewardServicer
    from services.runtime.inference import add_inference

    bounds = AudioBounds(max_batch_size=settings.max_batch_size)
    servicer = RewardServicer(judge, bounds, max_request_bytes=settings.max_request_bytes)
    metrics.registry.register(RewardCollector(judge))
    server.add(
        SERVICE_NAME, lambda grpc_server: rpc.add_RewardServiceServicer_to_server(servicer, grpc_server)
    )
    add_inference(server, JudgeModel(servicer, judge, bounds))


def load(settings: RewardSettings) -> "Judge":
    """Find and load the models of the settings.

    Raises:
        ModelError: one was not found or refused, or they do not belong together.
    """
    uri, clap_uri = _uris(settings)
    version = resolve(uri)
    try:
        clap = resolve(clap_uri)
    except ModelError as error:
        raise type(error)(f"clap: {error}") from error
    # Only now: torch takes seconds to import, and a wrong setting should be known at once.
    from services.reward.judge import load_judge

    return load_judge(version, clap, clap_uri.scheme, settings)


def _uris(settings: RewardSettings) -> tuple[ModelURI, ModelURI]:
    """The URIs of the reward model and of its CLAP model."""
    uris: list[ModelURI] = []
    faults: list[FieldViolation] = []
    for field, text in (("model", settings.model), ("clap", settings.clap)):
        try:
            uris.append(ModelURI.parse(text))
        except InvalidInputError as error:
            faults += [FieldViolation(field, fault.description) for fault in error.violations]
    if faults:
        raise InvalidInputError(*faults)
    model, clap = uris
    if settings.model.partition("#")[0] == FAMILY:
        model = replace(model, path=MEMBER)
    return model, clap


def _describe(judge: "Judge") -> dict[str, Any]:
    return {
        "model": judge.version.name,
        "version": judge.version.version,
        "digest": judge.version.digest,
        "folder": str(judge.version.folder),
        "clap": {"model": judge.clap.name, "digest": judge.clap.digest},
    }
