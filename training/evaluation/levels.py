"""Clips that a good score must not come from: silent ones (FAD and KL like them) and clipped ones.

Shape legend: N samples.
"""

import numpy as np
from numpy.typing import NDArray

SILENT_PEAK = 1e-2
"""A clip whose loudest sample is below this (-40 dB of full scale) counts as silent."""
FULL_SCALE = 0.9999
"""A clip with more than one sample at this level or above counts as clipped."""
FLOOR_DB = -100.0
"""Loudness of what is softer still."""


def is_silent(waveform_N: NDArray[np.float32]) -> bool:
    """Whether a clip in [-1, 1] is too soft to be heard."""
    return bool(np.abs(waveform_N).max(initial=0.0) < SILENT_PEAK)


def is_clipped(waveform_N: NDArray[np.float32]) -> bool:
    """Whether a clip in [-1, 1] lies at full scale more than once."""
    return int((np.abs(waveform_N) >= FULL_SCALE).sum()) > 1


def loudness_db(waveform_N: NDArray[np.float32]) -> float:
    """Root mean square in dB below full scale, `FLOOR_DB` to 0."""
    power = float(np.square(waveform_N, dtype=np.float64).mean()) if waveform_N.size else 0.0
    return max(FLOOR_DB, 10.0 * float(np.log10(max(power, 1e-30))))
