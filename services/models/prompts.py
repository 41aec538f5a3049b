"""The part of a generator that reads prompts: a T5 encoder and its tokenizer.

Shapes: B prompts, L text tokens, D text width.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from services.models.latent import Conditioning

LONGEST_TEXT: Final = 512
"""Tokens that FLAN-T5 was trained on: the limit where the tokenizer states none."""

TEXT_LENGTHS: Final = (64, 128, 256, LONGEST_TEXT)
"""Tokens that prompts are padded to where the model fixes no length. AudioCaps' captions fit the first."""


class T5Prompts:
    """The methods of a `LatentPipeline` that read prompts. Its config has `text_length`, or None."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    config: Any

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt that the text encoder reads; the rest is cut off."""
        return int(self.config.text_length or min(self.tokenizer.model_max_length, LONGEST_TEXT))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, length: int | None = None) -> Conditioning:
        """Embed `prompts`, padded to `length` tokens, else to the model's `text_length`, else to the longest.

        Returns ``embeds`` [B, L, D] and ``mask`` [B, L]. A prompt with more tokens is cut. The unconditional
        text of guidance is ``""`` at the same length: one end-of-sequence token, the rest masked. Masked
        positions do not change the clip.
        """
        length = length or self.config.text_length
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length" if length else "longest",
            max_length=length or self.max_prompt_tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        ids_BL, mask_BL = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        embeds_BLD = self.text_encoder(input_ids=ids_BL, attention_mask=mask_BL)[0]
        return Conditioning(tensors={"embeds": embeds_BLD, "mask": mask_BL == 1})

    def text_length(self, prompt: str) -> int:
        """Return the tokens that `prompt` is padded to, independent of the prompts beside it."""
        if self.config.text_length:
            return int(self.config.text_length)
        tokens = self.token_count(prompt)
        return min(next((n for n in TEXT_LENGTHS if n >= tokens), tokens), self.max_prompt_tokens)

    def token_count(self, prompt: str) -> int:
        """Return the tokens of `prompt`, end of sequence included, before any cut at `max_prompt_tokens`."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"])

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """Return the words of `prompt` that the tokenizer has no token for, in order, each once."""
        unknown = self.tokenizer.unk_token_id
        words = dict.fromkeys(re.findall(r"\w[\w'’-]*", prompt))
        encoded = ((word, self.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words)
        return tuple(word for word, ids in encoded if unknown in ids)

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`, one sentence each."""
        unknown, tokens, limit = self.unknown_words(prompt), self.token_count(prompt), self.max_prompt_tokens
        found: list[str] = []
        if unknown:
            found.append(f"the model does not know these words and ignores them: {', '.join(unknown)}")
        if tokens > limit:
            found.append(f"the prompt has {tokens} tokens and the model reads the first {limit}; shorten it")
        return tuple(found)
