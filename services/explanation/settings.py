"""Settings of the explanation service."""

from typing import Literal

from pydantic import Field

from services.catalogue import EXPLANATION
from services.runtime.settings import ModelText, ServerSettings
from services.weights.uri import ModelURI, parse_uris


class ExplanationSettings(ServerSettings):
    """Settings of the explanation service."""

    listen: str = EXPLANATION.listen
    model: ModelText
    """Generator whose clips are explained, preferably pinned to a digest. No default: a service never falls
    back to other weights by itself."""
    device: str = "auto"
    """auto (cuda if there is one, otherwise cpu), cpu, cuda or cuda:N."""
    threads: int | None = Field(default=None, gt=0, le=4096)
    """CPU threads of the model. Default: PyTorch's choice."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of text encoder and denoiser; autoencoder and vocoder stay in float32."""
    max_request_bytes: int = Field(default=64 * 2**20, gt=0, lt=2**31)
    """Maximum size of a request message in bytes, a clip included."""
    max_queue: int = Field(default=4, gt=0, le=10_000)
    """Calls that may wait. Beyond that, calls are refused at once (RESOURCE_EXHAUSTED)."""
    max_run_seconds: float = Field(default=3600.0, ge=0, le=86_400)
    """Time after which an explanation counts as hung. The service then fails its calls and ends with exit
    code 1. 0: no limit."""


def model_uris(settings: ExplanationSettings) -> dict[str, ModelURI]:
    """Return the URI of the generator (key: ``EXPLANATION.model``). Raises `InvalidInputError`."""
    return {EXPLANATION.model: parse_uris({"model": settings.model})["model"]}
