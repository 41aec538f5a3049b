"""Which tokens of an encoded prompt belong to which of its words.

Shapes: W words, L tokens, padding included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from services.audio.words import Word
from services.errors import invalid


def tokens_of_words(
    tokenizer: PreTrainedTokenizerBase, prompt: str, words: Sequence[Word], length: int
) -> Tensor:
    """Return for each word which of the `length` tokens of the encoded prompt are its own, bool [W, L].

    The end token, punctuation and padding belong to no word. A word that is truncated away has no token. A
    token that two words share (a wide unknown token) belongs to the first.

    Raises:
        InvalidInputError: the tokenizer does not say where its tokens are in the prompt.
    """
    if not tokenizer.is_fast:
        raise invalid(
            "model", "has a tokenizer without offsets (no tokenizer.json); convert it to a fast one"
        )
    spans = tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    owners_WL = torch.zeros((len(words), length), dtype=torch.bool)
    for index, (start, end) in enumerate(spans):
        # The end token has an empty span; a token of SentencePiece may begin with the space before its word.
        owner = next((n for n, word in enumerate(words) if start < word.end and word.start < end), None)
        if owner is not None:
            owners_WL[owner, index] = True
    return owners_WL
