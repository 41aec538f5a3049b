"""Compare explanations with the intervals in which the events of a clip are. Pure functions.

Shapes: W words, T frames, K thresholds.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.audio.words import Word
from services.models.words import FUNCTION_WORDS
from training.soundworld.captions import cut_caption, word_classes

THRESHOLDS: Final = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Thresholds of the intersection over union, as shares of a word's largest value."""

Row = NDArray[np.floating]
Inside = NDArray[np.bool_]


def frames_inside(onset: float, offset: float, frames: int, frame_seconds: float) -> Inside:
    """Return which frames have their middle in an interval of seconds, [T]; the nearest one if none has."""
    middles_T = (np.arange(frames) + 0.5) * frame_seconds
    inside_T = (middles_T >= onset) & (middles_T <= offset)
    if not inside_T.any():
        inside_T[np.abs(middles_T - (onset + offset) / 2).argmin()] = True
    return np.asarray(inside_T)


def mass_inside(row_T: Row, inside_T: Inside) -> float:
    """Return the share of a row's sum that is inside; that of a uniform row for a row of zeros."""
    total = float(row_T.sum())
    return float(row_T[inside_T].sum()) / total if total > 0 else float(inside_T.mean())


def widened(inside_T: Inside) -> Inside:
    """Return the frames inside, and one more on each side."""
    return inside_T | np.append(inside_T[1:], False) | np.append(False, inside_T[:-1])


def points_inside(row_T: Row, inside_T: Inside) -> float:
    """Return 1 if the largest value is inside, give or take a frame, else 0: the pointing game."""
    return float(widened(inside_T)[int(row_T.argmax())])


def average_precision(row_T: Row, inside_T: Inside) -> float:
    """Return the area under precision by recall, of the values as scores of the frames.

    Frames of equal values are taken together, so that a constant row has the base rate.
    """
    order = np.argsort(-row_T, kind="stable")
    hits_T = inside_T[order].cumsum()
    last_T = np.append(np.diff(row_T[order]) != 0, True)
    precision = (hits_T / np.arange(1, len(row_T) + 1))[last_T]
    recall = (hits_T / inside_T.sum())[last_T]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def unions(row_T: Row, inside_T: Inside) -> NDArray[np.float64]:
    """Return the intersection over union with the frames above each of `THRESHOLDS`, [K]."""
    share_T = row_T / max(float(row_T.max()), 1e-30)
    above_KT = share_T[None] >= np.array(THRESHOLDS)[:, None]
    return np.asarray((above_KT & inside_T).sum(1) / (above_KT | inside_T).sum(1))


def classes_of_phrases(caption: str, words: Sequence[Word]) -> list[str | None]:
    """Return for each word of a caption of the grammar the class of the event whose phrase includes it."""
    cut = cut_caption(caption)
    found: list[str | None] = [None] * len(words)
    place, lower = 0, caption.lower()
    for event, name in zip(cut.events if cut else (), cut.classes if cut else (), strict=True):
        start = lower.index(event, place)
        place = start + len(event)
        for index, word in enumerate(words):
            if start <= word.start and word.end <= place:
                found[index] = name
    return found


def classes_of_words(caption: str, words: Sequence[Word]) -> list[str | None]:
    """Return for each word of a caption of the grammar the class of the event that it names, or None.

    A word names an event if it occurs in the phrases of one class only ("dog", "barks"); "the" and "is" name
    none, although they belong to its phrase.
    """
    return [
        name if word_classes().get(word.text.lower()) == name else None
        for name, word in zip(classes_of_phrases(caption, words), words, strict=True)
    ]


def is_function_word(word: str) -> bool:
    """Return whether a word names no sound."""
    return word.lower() in FUNCTION_WORDS


def row_figures(row_T: Row, inside_T: Inside) -> dict[str, float]:
    """Return the figures of one word's row against its event's frames, and what chance gives.

    ``chance`` is the share of frames inside, ``pointing_chance`` that share with a frame more on each side.
    """
    return {
        "mass_inside": mass_inside(row_T, inside_T),
        "pointing": points_inside(row_T, inside_T),
        "average_precision": average_precision(row_T, inside_T),
        "chance": float(inside_T.mean()),
        "pointing_chance": float(widened(inside_T).mean()),
    }
