"""Recordings that a training can use: which can be read, and whose captions a text encoder knows."""

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from training.data.usable import language_warning

ENGLISH = ("a dog barks", "rain falls", "a bell rings loudly")


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of English words; others it splits into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = sorted({word for caption in ENGLISH for word in caption.split()} - {"loudly", "a"})
    tokens = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), *words]
    tokenizer = Tokenizer(WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


def test_captions_that_are_read_in_pieces_are_warned_of() -> None:
    assert language_warning(pieces(), ENGLISH) is None
    warning = language_warning(pieces(), ("ein Hund bellt", "es regnet stark"))
    assert warning is not None
    assert "reads 6 of 6 words of the captions in pieces (bellt, ein, es)" in warning
    assert language_warning(pieces(), ("bellt stark",)) is None, "too few words"
    assert language_warning(tiny_tokenizer(), ENGLISH) is None, "it knows whole words only"
