"""Settings of the scoring service."""

import re
from collections.abc import Mapping

from pydantic import Field, field_validator

from services.errors import FieldViolation, InvalidInputError
from services.runtime.settings import ServerSettings
from services.weights.uri import ModelURI

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


def model_uris(scorers: Mapping[str, str]) -> dict[str, ModelURI]:
    """Parse the URI of each scorer. Raises `InvalidInputError` with every wrong one."""
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
