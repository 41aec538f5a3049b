"""Recordings that a training can use: which can be read, and whose captions a text encoder knows."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from services.errors import InvalidInputError
from tests.tiny import tiny_tokenizer
from training.data.recordings import read_recordings
from training.data.usable import language_warning, readable_recordings

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


def test_clips_that_are_not_there_or_silent_are_named_with_the_remedy(tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for name, samples in (("good", np.ones(800) / 3), ("silent", np.zeros(800))):
        soundfile.write(sounds / f"{name}.wav", samples, 8_000)
    rows = [{"audio": f"{name}.wav", "caption": "a dog barks"} for name in ("good", "silent")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InvalidInputError, match=r"2 of 2 clips can't be read.*good\.wav: is not there; --audio-root"
    ):
        readable_recordings(read_recordings(tmp_path / "list.jsonl"), 0.1)
    found = readable_recordings(read_recordings(tmp_path / "list.jsonl", sounds), 0.5)
    assert [Path(one.clip.name).stem for one in found.recordings] == ["good"]
    assert list(found.unreadable.values()) == ["is silent: nothing above -80 dB in the mono mix"]
