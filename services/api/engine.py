"""Settings of the engine, which are settings of the generation service, too."""

from pydantic import BaseModel, ConfigDict, Field, field_validator


class EngineConfig(BaseModel):
    """How the engine shares the device. Raises `ValueError` for settings that can't work."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_shapes: tuple[int, ...] = (1, 2, 4, 8)
    """Clips that a denoiser call may hold, ascending; calls are padded to the smallest shape that fits. The
    last one is also the number of places for each latent length."""
    exact: bool = False
    """Pad every call to the largest batch shape: the same request gives the same bits under any load.
    Slower."""
    max_queue: int = Field(default=64, gt=0, le=1_000_000)
    """Clips that may wait for a place. Beyond that, requests are refused at once (RESOURCE_EXHAUSTED)."""
    max_queue_seconds: float = Field(default=900.0, gt=0, le=10_000_000)
    """Estimated wait in seconds beyond which requests are refused at once (RESOURCE_EXHAUSTED)."""
    max_previews: int = Field(default=32, gt=0, le=10_000)
    """Most previews of a clip. Of a request for more, only every second, third, … is sent."""
    max_turn_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """Seconds after which a denoising step, a decode or the encoding of a prompt counts as hung: the engine
    fails, and the service exits."""
    max_clip_count: int = Field(default=8, gt=0, le=4096)
    """Most clips in one request; never more than `max_queue`."""
    max_prompt_characters: int = Field(default=1000, gt=0, le=100_000)
    """Longest prompt, in characters."""
    prompt_cache_size: int = Field(default=256, gt=0, le=1_000_000)
    """Prompts whose embeddings are kept, the unconditional one included."""
    profile: str = ""
    """Profile of the model whose settings are the defaults of requests. Default: the model's own defaults."""
    threads: int | None = Field(default=None, gt=0, le=4096)
    """CPU threads of the model. Default: PyTorch's choice."""

    @field_validator("batch_shapes")
    @classmethod
    def _check_batch_shapes(cls, shapes: tuple[int, ...]) -> tuple[int, ...]:
        if not shapes or not 1 <= shapes[0] <= shapes[-1] <= 4096 or list(shapes) != sorted(set(shapes)):
            raise ValueError("must be ascending batch sizes from 1 to 4096, as (1, 2, 4, 8)")
        return shapes
