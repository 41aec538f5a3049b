"""The engine's settings."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the engine shares the device. Raises `ValueError` for settings that can't work."""

    batch_shapes: tuple[int, ...] = (1, 2, 4, 8)
    """Ascending batch sizes, in guided clips, that denoiser calls are padded to. The last one is also the
    number of places for each latent length."""
    exact: bool = False
    """Pad every call to the largest shape: same seed, same bits under any load; lone requests pay."""
    max_queue: int = 64
    """Clips that may wait for a place; beyond it, requests are refused at once."""
    max_lengths: int = 4
    """Latent lengths that run at a time, each with its own places. Bounds the memory of what runs."""
    max_clip_count: int = 8
    """Most clips in one request."""
    max_prompt_characters: int = 1000
    """Longest prompt, in characters."""
    prompt_cache_size: int = 256
    """Prompts whose embeddings are kept, the unconditional one included."""
    threads: int | None = None
    """CPU threads of the worker; None leaves PyTorch's choice."""

    def __post_init__(self) -> None:
        """Check what would otherwise fail far from its cause."""
        shapes = self.batch_shapes
        if not shapes or shapes[0] < 1 or list(shapes) != sorted(set(shapes)):
            raise ValueError(
                f"batch_shapes is {shapes}; give ascending batch sizes of 1 or more, as (1, 2, 4, 8)"
            )
        for name in (
            "max_queue",
            "max_lengths",
            "max_clip_count",
            "max_prompt_characters",
            "prompt_cache_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be 1 or more, or None")
        if self.max_clip_count > self.max_queue:
            raise ValueError(
                f"max_clip_count is {self.max_clip_count}, more than max_queue ({self.max_queue}): "
                "such a request could never be admitted"
            )
