"""Resampling: usual ratios are exact, unusual ones are rounded so little that nobody hears it."""

from fractions import Fraction

import numpy as np
import pytest

from services.audio.resampling import filter_ratio, resample


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 37_800, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("target", [16_000, 22_050, 44_100, 48_000])
def test_usual_ratios_are_exact(rate: int, target: int) -> None:
    assert filter_ratio(Fraction(target, rate)) == Fraction(target, rate)


def test_every_ratio_is_within_a_ten_thousandth_and_has_a_short_filter() -> None:
    for target in (8_000, 16_000, 44_100, 48_000):
        for rate in range(8_000, 192_001, 83):
            exact = Fraction(target, rate)
            rounded = filter_ratio(exact)
            assert abs(rounded / exact - 1) < 1e-4
            assert max(rounded.as_integer_ratio()) <= 8_192


@pytest.mark.parametrize("rate", [8_009, 44_101, 95_999, 191_999])
def test_clips_of_unusual_rates_keep_their_length_and_pitch(rate: int) -> None:
    times_N = np.arange(rate) / rate
    found_N = resample(np.sin(2 * np.pi * 440 * times_N).astype(np.float32), rate, 16_000)
    assert len(found_N) == 16_000
    expected_N = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(found_N - expected_N)[500:-500].max() < 0.05
    assert np.isfinite(resample(np.zeros((2, rate), np.float32), rate, 16_000)).all()
