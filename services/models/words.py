"""Tokenizers, and warnings on parts of a prompt that a text encoder does not read."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import transformers
from transformers import PreTrainedTokenizerBase

from services.api.scoring import merge_warnings
from services.errors import ModelFormatError, ModelNotFoundError
from services.models.folders import cause
from services.models.state_dicts import quiet_loading

_INSIDE_WORDS: Final = "'’-"
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MOST_WORDS, _MOST_CHARACTERS = 10, 40
"""Unknown words in a warning, and characters of each."""

_SMALLEST_SHARE: Final = 0.9
"""Share of the text encoder's vocabulary that its tokenizer must have: without its files, transformers
creates a tokenizer with a handful of tokens and no error."""


def load_tokenizer(folder: Path, vocabulary: int) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`, for a text encoder with `vocabulary` tokens.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFormatError: the folder has no tokenizer, or one with another vocabulary.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the folder of the text encoder's tokenizer")
    try:
        with quiet_loading():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # no files, broken files: several libraries' errors
        raise ModelFormatError(f"{folder} holds no tokenizer: {cause(folder, error)}") from error
    known = len(tokenizer)
    if not _SMALLEST_SHARE * vocabulary <= known <= vocabulary:
        raise ModelFormatError(
            f"{folder}: its tokenizer has {known} tokens, but the text encoder has {vocabulary}; its files "
            "(tokenizer.json, or vocab.json and merges.txt) are missing, or from another model"
        )
    if tokenizer.pad_token_id is None:
        raise ModelFormatError(f"{folder}: its tokenizer has no pad_token")
    return tokenizer


def prompt_warnings(tokenizer: PreTrainedTokenizerBase, prompt: str, max_tokens: int) -> tuple[str, ...]:
    """Return what the model does not read of `prompt`: predicates, to be put after the field's name.

    `max_tokens` is the number of tokens, special ones included, after which the model truncates.
    """
    unknown, tokens = unknown_words(tokenizer, prompt), token_count(tokenizer, prompt)
    found: list[str] = []
    if unknown:
        named = ", ".join(word[:_MOST_CHARACTERS] for word in unknown[:_MOST_WORDS])
        more = f" and {len(unknown) - _MOST_WORDS} more" if len(unknown) > _MOST_WORDS else ""
        found.append(f"has words that the model does not know: {named}{more}; use other words")
    if tokens > max_tokens:
        found.append(f"has {tokens} tokens and the model reads the first {max_tokens}; shorten it")
    return tuple(found)


def warnings_of(
    models: Mapping[str, Callable[[str], tuple[str, ...]]], prompts: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return for each prompt the warnings of several models, by name, as `merge_warnings`."""
    found = {
        prompt: merge_warnings({name: warnings(prompt) for name, warnings in models.items()})
        for prompt in dict.fromkeys(prompts)
    }
    return [found[prompt] for prompt in prompts]


def unknown_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, ...]:
    """Return the distinct words of `prompt`, emoji included, that the tokenizer has no token for, in order.

    A tokenizer of bytes has a token for everything; there, words with a character that it splits count.
    """
    words = list(dict.fromkeys(split_words(prompt)))
    encoded = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"] if words else []
    return tuple(word for word, ids in zip(words, encoded, strict=True) if _is_unknown(tokenizer, word, ids))


def split_words(prompt: str) -> list[str]:
    """Return the words of `prompt`, without punctuation around them."""
    spaced = "".join(
        " " if unicodedata.category(one)[0] in "PZ" and one not in _INSIDE_WORDS else one for one in prompt
    )
    return [word for part in spaced.split() if (word := part.strip(_INSIDE_WORDS))]


def token_count(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Return the number of tokens of `prompt`, special ones included, before truncation."""
    return len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def _is_unknown(tokenizer: PreTrainedTokenizerBase, word: str, ids: list[int]) -> bool:
    if tokenizer.unk_token_id in ids:
        return True
    return not word.isascii() and any(_REPLACEMENT in tokenizer.decode([one]) for one in ids)
