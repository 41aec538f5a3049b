import math
from dataclasses import replace

import numpy as np
import pytest

from services.api.generation import GenerationRequest, Limits, at_loudness, validate, violations
from services.errors import InvalidInputError

LIMITS = Limits(min_duration=0.04, max_duration=10.24, schedulers=("ddpm", "ddim"))
GOOD = GenerationRequest(
    prompt="A dog barks then a siren wails",
    duration=10.24,
    seed=7,
    num_inference_steps=25,
    guidance_scale=3.0,
    scheduler="ddpm",
    sampling_rate=16_000,
)


def test_a_good_request_passes() -> None:
    assert violations(GOOD, LIMITS) == ()
    validate(GOOD, LIMITS)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "x" * 1000},
        {"prompt": "Ein Köter bellt — 犬が吠える 🐕"},
        {"duration": 0.04},
        {"clip_count": 8},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"num_inference_steps": 1},
        {"num_inference_steps": 1000},
        {"guidance_scale": 0},
        {"guidance_scale": 20},
        {"negative_prompt": "rain"},
        {"loudness": -60.0},
        {"loudness": -6.0},
    ],
)
def test_the_bounds_are_inclusive(change: dict[str, object]) -> None:
    assert violations(replace(GOOD, **change), LIMITS) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "", "is empty"),
        ("prompt", "  \u00a0", "is empty"),
        ("prompt", "x" * 1001, "1001 characters, the limit is 1000"),
        ("prompt", "a dog\x00 barks", "U+0000 at position 5"),
        ("prompt", "a dog\nbarks", "U+000A"),
        ("prompt", "a dog\ud800", "U+D800"),
        ("negative_prompt", "\x1b[31m", "U+001B"),
        ("negative_prompt", "x" * 1001, "the limit is 1000"),
        ("duration", 0.0, "between 0.04 and 10.24 s"),
        ("duration", -1.0, "is -1 s"),
        ("duration", 10.25, "is 10.25 s"),
        ("duration", math.nan, "is nan s"),
        ("duration", math.inf, "is inf s"),
        ("clip_count", 0, "between 1 and 8"),
        ("clip_count", 9, "is 9"),
        ("seed", -1, "is -1"),
        ("seed", 2**64, "is 18446744073709551616"),
        ("num_inference_steps", 0, "between 1 and 1000"),
        ("num_inference_steps", -1, "is -1"),
        ("num_inference_steps", 10_000, "is 10000"),
        ("guidance_scale", math.nan, "is nan"),
        ("guidance_scale", -0.1, "between 0 and 20"),
        ("guidance_scale", 20.1, "is 20.1"),
        ("scheduler", "euler", "must be one of ddpm, ddim"),
        ("scheduler", "x" * 10_000, "must be one of"),
        ("preview_interval_steps", -1, "is -1"),
        ("loudness", -5.9, "between -60 and -6 dB"),
        ("loudness", math.nan, "is nan dB"),
        ("encoding", "aac", "must be one of wav, flac, ogg, mp3, opus, linear16, float32"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_the_limit(field: str, value: object, says: str) -> None:
    (violation,) = violations(replace(GOOD, **{field: value}), LIMITS)  # type: ignore[arg-type]
    assert violation.field == field
    assert says in violation.description
    assert len(violation.description) < 200


def test_a_rate_that_the_encoding_can_not_hold_is_named() -> None:
    (violation,) = violations(replace(GOOD, encoding="opus", sampling_rate=44_100), LIMITS)
    assert violation.field == "sample_rate_hertz"
    assert "which opus can't hold" in violation.description


@pytest.mark.parametrize("rate", [0, 7_999, 48_001])
def test_a_sampling_rate_is_named_as_on_the_wire(rate: int) -> None:
    (violation,) = violations(replace(GOOD, sampling_rate=rate), LIMITS)
    assert violation.field == "sample_rate_hertz"
    assert "between 8000 and 48000 hertz" in violation.description


def test_a_clip_is_brought_to_a_loudness_and_never_clipped() -> None:
    tone_N = (0.01 * np.sin(np.arange(16_000))).astype(np.float32)
    level = 20 * np.log10(np.sqrt(np.mean(at_loudness(tone_N, -20.0) ** 2)))
    assert level == pytest.approx(-20.0, abs=1e-3)
    impulse_N = np.zeros(16_000, dtype=np.float32)
    impulse_N[100] = 0.5
    assert np.abs(at_loudness(impulse_N, -6.0)).max() == 1.0
    assert not at_loudness(np.zeros(10, dtype=np.float32), -6.0).any()


def test_all_violations_come_at_once() -> None:
    bad = replace(GOOD, prompt="", duration=0, clip_count=0, num_inference_steps=0, guidance_scale=math.nan)
    with pytest.raises(InvalidInputError) as caught:
        validate(bad, LIMITS)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["prompt", "duration", "clip_count", "num_inference_steps", "guidance_scale"]
