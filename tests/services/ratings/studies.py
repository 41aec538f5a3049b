"""A listening test of two models that a listener can tell by their pitch."""

import io
from collections.abc import Sequence

import numpy as np
import soundfile

from services.api.model import ModelVersion
from services.audio.encoding import encode_audio
from services.ratings.planning import plan_items
from services.ratings.store import Rater, RatingStore

PROMPTS = [f"{event} number {index}" for index in range(5) for event in ("a dog barks", "rain falls")]


def clip_of(prompt: str, seed: int, hertz: float) -> bytes:
    time_N = np.arange(8_000) / 16_000
    sound_N = 0.3 * np.sin(2 * np.pi * hertz * time_N) + 1e-3 * len(prompt) + 1e-4 * (seed % 97)
    return encode_audio(sound_N.astype(np.float32), 16_000, "flac")


def make_a(prompt: str, seed: int) -> bytes:
    return clip_of(prompt, seed, 400.0)


def make_b(prompt: str, seed: int) -> bytes:
    return clip_of(prompt, seed, 900.0)


def is_b(content: bytes) -> bool:
    """Whether a clip is b's: a listener of this test tells them by their pitch."""
    sound_N, _ = soundfile.read(io.BytesIO(content))
    return bool(np.abs(np.fft.rfft(sound_N))[1:].argmax() + 1 > 300)


def planned_store(
    url: str, models: tuple[ModelVersion, ModelVersion] | None = None, prompts: Sequence[str] = PROMPTS
) -> RatingStore:
    """Return a database with a study: a pair per prompt, 30 % of repeats, 20 % of known answers."""
    store = RatingStore(url)
    items = list(plan_items(prompts, make_a, make_b, seed=3, repeats=0.3, known=0.2))
    store.add_study("mini", "mini-base", 3, items, models)
    return store


def rate_all(store: RatingStore, name: str, prefers_b: bool = True) -> Rater:
    """Have a rater prefer one model everywhere."""
    rater = store.rater(store.add_rater(name))
    while (shown := store.next_item(rater)[0]) is not None:
        left_is_b = is_b(store.clip(shown.left))
        store.rate(rater, shown.id, "left" if left_is_b == prefers_b else "right")
    return rater
