import io

import numpy as np
import pytest
from PIL import Image

from services.audio.spectrogram import SpectrogramConfig, log_mel_db, spectrogram_png, spectrogram_sheet_png


def sine(hertz: float, seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_a_full_scale_sine_is_near_0_db_and_in_the_right_band() -> None:
    config = SpectrogramConfig()
    levels_MT = log_mel_db(sine(1000.0), 16_000, config)
    peak = levels_MT[:, levels_MT.shape[1] // 2]
    mel = 2595 * np.log10(1 + 1000 / 700)
    top = 2595 * np.log10(1 + 8000 / 700)
    assert abs(int(peak.argmax()) - (mel / top * (config.mel_bins + 1) - 1)) <= 1
    assert -12 < peak.max() <= 0.5


def test_halving_the_amplitude_takes_6_db_away() -> None:
    loud, soft = log_mel_db(sine(440.0), 16_000), log_mel_db(0.5 * sine(440.0), 16_000)
    assert loud.max() - soft.max() == pytest.approx(6.02, abs=0.01)


def test_silence_is_the_floor() -> None:
    assert np.allclose(log_mel_db(np.zeros(16_000), 16_000), SpectrogramConfig().floor_db)


@pytest.mark.parametrize("samples", [0, 1, 100, 1024, 16_000])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_any_length_and_rate_gives_a_picture(samples: int, rate: int) -> None:
    png = spectrogram_png(np.zeros(samples, np.float32), rate, title="nothing")
    assert Image.open(io.BytesIO(png)).size == (640 + 44 + 12, 192 + 20 + 22)


def test_a_sheet_holds_every_clip_side_by_side() -> None:
    one = Image.open(io.BytesIO(spectrogram_sheet_png([("a", sine(440.0))], 16_000)))
    five = Image.open(io.BytesIO(spectrogram_sheet_png([("a", sine(440.0))] * 5, 16_000, columns=2)))
    assert five.size == (2 * one.width, 3 * one.height)


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one clip"):
        spectrogram_sheet_png([], 16_000)
