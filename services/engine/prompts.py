"""Prompts as the model reads them, each encoded once.

Each is encoded alone, so that its bits do not depend on the prompts beside it.
"""

from collections import OrderedDict
from dataclasses import dataclass

from services.models.latent import Conditioning, LatentPipeline


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedPrompt:
    """One prompt as the denoiser takes it."""

    conditioning: Conditioning
    """One row, on the model's device."""
    warnings: tuple[str, ...]
    """What the model does not read of it."""


class PromptCache:
    """The last prompts, encoded. Not thread-safe: the engine's worker owns it."""

    def __init__(self, pipeline: LatentPipeline, size: int) -> None:
        self._pipeline = pipeline
        self._size = size
        self._entries: OrderedDict[str, EncodedPrompt] = OrderedDict()

    def encode(self, prompt: str) -> EncodedPrompt:
        """Return `prompt` encoded, from the cache if it is there."""
        entry = self._entries.get(prompt)
        if entry is None:
            pipeline = self._pipeline
            entry = self._entries[prompt] = EncodedPrompt(
                conditioning=pipeline.encode([prompt], length=pipeline.text_length(prompt)),
                warnings=pipeline.prompt_warnings(prompt),
            )
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)
        self._entries.move_to_end(prompt)
        return entry
