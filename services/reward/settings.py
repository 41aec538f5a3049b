"""Settings of the reward service."""

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from services.errors import FieldViolation, InvalidInputError
from services.runtime.settings import ServerSettings
from services.weights.uri import ModelURI

if TYPE_CHECKING:
    pass


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


def model_uris(settings: RewardSettings) -> tuple[ModelURI, ModelURI]:
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
