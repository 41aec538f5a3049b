"""Which recordings a training can use: those that can be read, with captions that a text encoder knows."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from services.audio.levels import has_sound
from services.errors import invalid
from services.models.words import FUNCTION_WORDS, split_words
from training.data.examples import Clip, check_readable, short_message
from training.data.recordings import Recording
from training.loop.progress import progress

_FEWEST_WORDS = 4
"""Distinct words below which nothing is said of their language."""
_LISTED = 3


class Readable(NamedTuple):
    """The recordings that can be read and sound, and the others' reasons."""

    recordings: list[Recording]
    unreadable: dict[Clip, str]


def readable_recordings(recordings: Sequence[Recording], limit: float) -> Readable:
    """Decode each recording once; print those that can't be read, or are silent.

    Raises `InvalidInputError` if their share exceeds `limit`.
    """
    unreadable: dict[Clip, str] = {}
    with progress(total=len(recordings), desc="recordings", unit="clip") as bar:
        for one in recordings:
            try:
                waveform, _ = one.clip.read()
                if not has_sound(np.atleast_2d(waveform).mean(axis=0)):
                    unreadable[one.clip] = "is silent: nothing above -80 dB in the mono mix"
            except FileNotFoundError:
                unreadable[one.clip] = (
                    "is not there; --audio-root is the folder that clips of a list start from"
                )
            except (OSError, ValueError) as error:
                unreadable[one.clip] = short_message(error)
            bar.update()
    check_readable(unreadable, len(recordings), limit)
    return Readable([one for one in recordings if one.clip not in unreadable], unreadable)


def known_captions(
    recordings: Sequence[Recording], knows: Callable[[str], bool], encoder: str, remedy: str
) -> list[Recording]:
    """Return the recordings with the captions that a text encoder knows; print how many have none.

    Args:
        recordings: what a training would learn.
        knows: whether the encoder knows a word for a sound in a caption.
        encoder: its name, for messages.
        remedy: what to do about unknown captions.

    Raises `InvalidInputError` if it knows none.
    """
    known, lost = [], []
    for one in recordings:
        kept = {
            caption: place for caption, place in zip(one.captions, one.places, strict=True) if knows(caption)
        }
        if kept:
            known.append(replace(one, captions=tuple(kept), places=tuple(kept.values())))
        else:
            lost.append(one)
    if lost:
        example = next((one.captions[0] for one in lost if one.captions), "no caption")
        found = (
            f"{len(lost)} of {len(recordings)} recordings have no caption with a word for a sound that the "
            f"text encoder of {encoder} knows ({example[:60]!r})"
        )
        if not known:
            raise invalid("data", f"{found}; {remedy}")
        print(f"warning: {found}: they are left out; {remedy}", file=sys.stderr)
    return known


def language_warning(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str]) -> str | None:
    """Return a warning if a text encoder reads half of the captions' words in pieces, as of other languages.

    In English captions, MiniLM's tokenizer splits a fifth of the words; in German or Spanish ones half and
    more.
    """
    words = sorted({word.lower() for text in captions for word in split_words(text)} - FUNCTION_WORDS)
    if len(words) < _FEWEST_WORDS:
        return None
    encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [word for word, ids in zip(words, encoded, strict=True) if len(ids) > 1]
    if 2 * len(pieces) < len(words):
        return None
    return (
        f"the text encoder reads {len(pieces)} of {len(words)} words of the captions in pieces "
        f"({', '.join(pieces[:_LISTED])}): perhaps it does not know their language; if so, write captions in "
        "one that it knows (of classes: captions.json)"
    )
