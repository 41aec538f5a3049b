"""Encode prompts with a text encoder and its tokenizer, for generators.

Shapes: B prompts, L text tokens, D text width.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.models.latent import Conditioning
from services.models.words import prompt_warnings, token_count

LONGEST_TEXT: Final = 512
"""FLAN-T5's context length in tokens: the limit if the tokenizer states none."""

TEXT_LENGTHS: Final = (64, 128, 256, LONGEST_TEXT)
"""Lengths in tokens to pad prompts to, if the model has no fixed length. AudioCaps' captions fit 64."""


def token_limit(tokenizer: PreTrainedTokenizerBase, text_length: int | None) -> int:
    """Return the maximum number of tokens of a prompt. `text_length` is the model's fixed one, or None."""
    return int(text_length or min(tokenizer.model_max_length, LONGEST_TEXT))


class TextPrompts:
    """Implements a `LatentPipeline`'s methods for prompts. `text_length` of its config is fixed, or None."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    config: Any

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt; the rest is truncated."""
        return token_limit(self.tokenizer, self.config.text_length)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, length: int | None = None) -> Conditioning:
        """Encode `prompts`; return ``embeds`` [B, L, D] and ``mask`` [B, L].

        Prompts are truncated or padded to `length` tokens; if None, to the model's `text_length`; if None
        too, to the longest. The unconditional text of guidance is ``""`` at the same length: special
        tokens (T5's end of sequence), the rest masked. Masked positions don't change the clip.
        """
        length = length or self.config.text_length
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length" if length else "longest",
            max_length=length or self.max_prompt_tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = cast(Any, self).device_of(self.text_encoder)
        ids_BL, mask_BL = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        embeds_BLD = self.text_encoder(input_ids=ids_BL, attention_mask=mask_BL)[0]
        return Conditioning(tensors={"embeds": embeds_BLD, "mask": mask_BL == 1})

    def text_length(self, prompt: str) -> int:
        """Return the number of tokens to pad `prompt` to; it does not depend on other prompts."""
        if self.config.text_length:
            return int(self.config.text_length)
        tokens = self.token_count(prompt)
        return min(next((n for n in TEXT_LENGTHS if n >= tokens), tokens), self.max_prompt_tokens)

    def token_count(self, prompt: str) -> int:
        """Return the number of tokens of `prompt`, end of sequence included, before truncation."""
        return token_count(self.tokenizer, prompt)

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`: predicates, to be put after the field's name."""
        return prompt_warnings(self.tokenizer, prompt, self.max_prompt_tokens)
