"""Durations against latent frames and samples."""

import math

import pytest

from services.errors import ModelFormatError
from services.models.tango.geometry import Geometry


def test_tango_geometry() -> None:
    geometry = Geometry()
    assert geometry.grid == pytest.approx(0.04)
    assert geometry.latent_shape(10.24) == (8, 256, 16)
    assert geometry.samples(10.24) == 163_840


@pytest.mark.parametrize(
    ("duration", "frames"),
    [(0.001, 8), (0.32, 8), (0.3201, 16), (5.0, 128), (5.12, 128), (5.13, 136), (10.24, 256)],
)
def test_duration_is_rounded_up_to_what_the_denoiser_takes(duration: float, frames: int) -> None:
    assert Geometry().latent_frames(duration) == frames


def test_every_multiple_of_the_grid_costs_no_frame_too_many() -> None:
    geometry = Geometry(frame_multiple=1, max_duration=100.0)
    assert all(geometry.latent_frames(n * geometry.grid) == n for n in range(1, 2500))


def test_latents_hold_the_whole_clip() -> None:
    geometry = Geometry(frame_multiple=4, latent_downsampling=8)
    for milliseconds in range(1, 10_240, 37):
        duration = milliseconds / 1000
        held = geometry.latent_frames(duration) * geometry.latent_downsampling * geometry.hop_length
        assert held >= geometry.samples(duration)


@pytest.mark.parametrize("duration", [0.0, -1.0, math.nan, math.inf])
def test_impossible_durations_are_refused(duration: float) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        Geometry().latent_frames(duration)


def test_impossible_geometry_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="hop_length is 0"):
        Geometry(hop_length=0)
    with pytest.raises(ModelFormatError, match="multiple of"):
        Geometry(mel_bins=66)
    with pytest.raises(ModelFormatError, match="at most max_duration"):
        Geometry(default_duration=11.0)
