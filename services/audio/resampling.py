"""Resample sound. Shapes: N samples."""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def resample(waveform_N: NDArray[np.float32], sampling_rate: int, target_rate: int) -> NDArray[np.float32]:
    """Return [..., N * target_rate / sampling_rate, rounded] samples of [..., N], low-pass filtered.

    A polyphase filter is used, which may overshoot [-1, 1] a little. Equal rates return the same array.
    """
    if sampling_rate == target_rate:
        return waveform_N
    from scipy.signal import (
        resample_poly,
    )  # slow to import, rarely needed, and not a dependency of the client

    ratio = Fraction(target_rate, sampling_rate)
    resampled = resample_poly(waveform_N, ratio.numerator, ratio.denominator, axis=-1)
    # resample_poly rounds the length up, which would change the clip's duration.
    return resampled[..., : round(waveform_N.shape[-1] * ratio)].astype(np.float32)
