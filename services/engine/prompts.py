"""Encode prompts, with a cache.

Each prompt is encoded alone, so that its encoding is bitwise independent of other prompts.
"""

from collections import OrderedDict
from dataclasses import dataclass

from services.models.latent import Conditioning, LatentPipeline


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedPrompt:
    """One encoded prompt, the denoiser's input."""

    conditioning: Conditioning
    """One row, on the model's device."""
    warnings: tuple[str, ...]
    """What the model does not read of the prompt: predicates, to be put after the field's name."""


class PromptCache:
    """An LRU cache of encoded prompts. Not thread-safe: the engine's worker owns it."""

    def __init__(self, pipeline: LatentPipeline, size: int) -> None:
        self._pipeline = pipeline
        self._size = size
        self._entries: OrderedDict[str, EncodedPrompt] = OrderedDict()

    def encode(self, prompt: str) -> EncodedPrompt:
        """Return the encoded prompt, from the cache if possible."""
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
