"""Levels of clips. Shapes: N samples."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

SILENT_PEAK: Final = 1e-2
"""A clip whose peak is below this (-40 dB of full scale) counts as silent."""

SOUNDLESS_POWER: Final = 1e-8
"""Mean square at or below which there is nothing in a clip: -80 dB."""


def is_silent(waveform_N: NDArray[np.float32]) -> bool:
    """Return whether the peak of a clip in [-1, 1] is below `SILENT_PEAK`."""
    return bool(np.abs(waveform_N).max(initial=0.0) < SILENT_PEAK)


def has_sound(waveform_N: NDArray[np.float32]) -> bool:
    """Return whether the mean square of a clip is above `SOUNDLESS_POWER`."""
    return float(np.vdot(waveform_N, waveform_N)) > SOUNDLESS_POWER * waveform_N.size
