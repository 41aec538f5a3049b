"""Tokenizers, and warnings on parts of a prompt that a text encoder does not read."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import transformers
from transformers import PreTrainedTokenizerBase

from services.api.scoring import merge_warnings
from services.audio.words import find_words
from services.errors import ModelFormatError, ModelNotFoundError
from services.models.folders import cause
from services.models.state_dicts import quiet_loading

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MOST_WORDS, _MOST_CHARACTERS = 10, 40
"""Unknown words in a warning, and characters of each."""

_SMALLEST_SHARE: Final = 0.9
"""Share of the text encoder's vocabulary that its tokenizer must have: without its files, transformers
creates a tokenizer with a handful of tokens and no error."""

_FUNCTION_WORDS: Final = """
a an the some any this that these those both all several many few one two three four five
i you he she it we they someone somebody something who which what there here
is are was were be been being am has have had having do does did can could will would may might
of in on at by to from into onto over under up down off out with through near around along for about
and or but as while when then than so after afterwards before during until since if because once
first second third finally next later again also too very right just soon shortly together same time
sound sounds noise noises hear hears heard audible background followed following
"""
FUNCTION_WORDS: Final = frozenset(_FUNCTION_WORDS.split())
"""Words that name no sound."""
_NEGATIONS: Final = "no not without never none nothing nobody neither nor cannot"
NEGATIONS: Final = frozenset(_NEGATIONS.split())
"""Words that exclude what follows them; so does every word that ends in ``n't``."""


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
    negations = [word for word in dict.fromkeys(split_words(prompt)) if _negates(word)]
    if negations:
        found.append(
            f"excludes something ({', '.join(negations[:_MOST_WORDS])}), which the model does not read as "
            "such; name only sounds that should be there"
        )
    if unknown:
        named = ", ".join(word[:_MOST_CHARACTERS] for word in unknown[:_MOST_WORDS])
        more = f" and {len(unknown) - _MOST_WORDS} more" if len(unknown) > _MOST_WORDS else ""
        lost = "" if is_readable(tokenizer, prompt) else ", and none for a sound that it knows"
        found.append(f"has words that the model does not know: {named}{more}{lost}; use other words")
    if tokens > max_tokens:
        found.append(f"has {tokens} tokens and the model reads the first {max_tokens}; shorten it")
    return tuple(found)


def is_readable(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Return whether the tokenizer has a token for any of the words of `prompt` that may name a sound."""
    words = [word for word in split_words(prompt) if not _negates(word)]
    content = [word for word in words if word.lower() not in FUNCTION_WORDS] or words
    unknown = set(unknown_words(tokenizer, prompt))
    return any(word not in unknown for word in content)


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
    return [word.text for word in find_words(prompt)]


def token_count(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Return the number of tokens of `prompt`, special ones included, before truncation."""
    return len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def _negates(word: str) -> bool:
    plain = word.lower().replace("’", "'")
    return plain in NEGATIONS or plain.endswith("n't")


def _is_unknown(tokenizer: PreTrainedTokenizerBase, word: str, ids: list[int]) -> bool:
    if tokenizer.unk_token_id in ids:
        return True
    return not word.isascii() and any(_REPLACEMENT in tokenizer.decode([one]) for one in ids)
