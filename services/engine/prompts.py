"""Text embeddings, each computed once.

Shapes: L text tokens, D text width. Prompts are embedded alone, so that their bits depend on no companion.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from services.engine.batching import text_length
from services.models.tango.pipeline import TangoPipeline

# Text is padded to one of these where the pipeline fixes no length; AudioCaps' captions fit the first.
TEXT_LENGTHS = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EmbeddedPrompt:
    """One prompt as the denoiser takes it."""

    embeds_1LD: Tensor
    """Token embeddings, on the model's device."""
    mask_1L: Tensor
    """True where there is a token."""
    warnings: tuple[str, ...]
    """What the model can't read of it."""


class PromptCache:
    """The last prompts' embeddings. Not thread-safe: the engine's worker owns it."""

    def __init__(self, pipeline: TangoPipeline, size: int) -> None:
        self._pipeline = pipeline
        self._size = size
        self._entries: OrderedDict[str, EmbeddedPrompt] = OrderedDict()
        self._text_length: int | None = pipeline.config.text_length

    def embed(self, prompt: str) -> EmbeddedPrompt:
        """Return `prompt` embedded, from the cache if it is there."""
        entry = self._entries.get(prompt)
        if entry is None:
            entry = self._entries[prompt] = self._compute(prompt)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)
        self._entries.move_to_end(prompt)
        return entry

    def _compute(self, prompt: str) -> EmbeddedPrompt:
        pipeline = self._pipeline
        tokens, limit = pipeline.token_count(prompt), pipeline.geometry.max_prompt_tokens
        length = self._text_length or min(text_length(tokens, TEXT_LENGTHS), limit)
        embedded = pipeline.encode_prompt([prompt], length=length)
        return EmbeddedPrompt(
            embeds_1LD=embedded.embeds_BLD,
            mask_1L=embedded.mask_BL,
            warnings=_warnings(tokens, limit, pipeline.unknown_words(prompt)),
        )


def _warnings(tokens: int, limit: int, unknown: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    if unknown:
        found.append(f"the model does not know these words and ignores them: {', '.join(unknown)}")
    if tokens > limit:
        found.append(f"the prompt has {tokens} tokens and the model reads the first {limit}; shorten it")
    return tuple(found)
