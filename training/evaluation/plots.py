"""Plots as PNG: distributions of metrics, and spectrograms side by side.

They don't use pyplot, which has global state and may need a display.
"""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from services.audio.resampling import resample
from services.audio.spectrogram import SpectrogramConfig, spectrogram_sheet_png
from training.data.examples import Clip

DPI = 120
COLUMNS = 3
BINS = 30
"""Maximum number of bins of a histogram."""
SHEET_RATE = 16_000
"""Sampling rate of spectrograms, in hertz."""


def distribution_plot(values: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> bytes | None:
    """Return histograms of `values`, metrics of single clips by name and model; dashed lines are means.

    Metrics with at most two different values are left out; None if all are.
    """
    names = [name for name, models in values.items() if _is_continuous(list(models.values()))]
    if not names:
        return None
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        models = {model: column[np.isfinite(column)] for model, column in values[name].items()}
        together = np.concatenate(list(models.values()))
        # Fewer bins for fewer clips.
        bins = min(BINS, max(5, round(2 * math.sqrt(len(together) / len(models)))))
        edges = np.linspace(together.min(), together.max(), bins + 1)
        for number, column in enumerate(models.values()):
            colour = f"C{number % 10}"
            axis.hist(column, bins=edges, histtype="step", color=colour, linewidth=1.4)
            axis.axvline(float(column.mean()), color=colour, linestyle="--", linewidth=1)
        axis.set(title=name, ylabel="clips")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.legend(
        axes[0].patches,
        list(next(iter(values.values()))),
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    return _png(figure)


def spectrogram_sheet(prompts: Sequence[str], models: Mapping[str, Sequence[Clip | None]]) -> bytes | None:
    """Return spectrograms, a row per prompt, a column per model (or for the references).

    Prompts with a missing or unreadable clip are left out; None if all are.
    """
    cells: list[tuple[str, NDArray[np.float32]]] = []
    for row, prompt in enumerate(prompts):
        waveforms = {name: _waveform(clips[row]) for name, clips in models.items()}
        if all(waveform is not None for waveform in waveforms.values()):
            cells += [(f"{name}: {prompt}"[:66], w) for name, w in waveforms.items() if w is not None]
    if not cells:
        return None
    config = SpectrogramConfig(width=380, height=120)
    return spectrogram_sheet_png(cells, SHEET_RATE, columns=len(models), config=config)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No version and no date: the same plot gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _is_continuous(columns: Sequence[NDArray[np.float64]]) -> bool:
    finite = [column[np.isfinite(column)] for column in columns]
    return all(len(column) for column in finite) and len(np.unique(np.concatenate(finite))) > 2


def _waveform(clip: Clip | None) -> NDArray[np.float32] | None:
    try:
        waveform, rate = clip.read() if clip is not None else (None, 0)
    except (OSError, ValueError):
        return None
    if waveform is None:
        return None
    return resample(waveform if waveform.ndim == 1 else waveform.mean(axis=0), rate, SHEET_RATE)
