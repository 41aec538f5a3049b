"""Settings of the generation service."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from services.runtime.settings import ServerSettings


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
