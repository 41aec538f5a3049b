"""A plot of predicted probabilities against the share of positives.

Shape legend: B examples.
"""

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from training.objectives.calibration import reliability

DPI = 120


def reliability_figure(probabilities: Mapping[str, NDArray[np.float64]], labels_B: ArrayLike) -> bytes:
    """Return a PNG: predicted probabilities, by name, against the share of positives.

    Below it are the numbers of examples. The same values give the same bytes.
    """
    figure = Figure(figsize=(5, 6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    figure.subplots_adjust(left=0.14, right=0.96, top=0.94, bottom=0.09, hspace=0.08)
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    for name, values_B in probabilities.items():
        bins = reliability(values_B, labels_B)
        means = [part.probability for part in bins]
        upper.plot(means, [part.share for part in bins], marker="o", markersize=4, label=name)
        lower.plot(means, [part.count for part in bins], marker="o", markersize=3)
    upper.set(title="held-out prompts", ylabel="share of positive examples", xlim=(0, 1), ylim=(0, 1))
    upper.legend(loc="upper left")
    lower.set(xlabel="probability", ylabel="examples", yscale="log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
