"""Plots as PNG bytes. Drawn without pyplot, so that nothing global is touched and no display is needed."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from training.evaluation.calibration import ReliabilityBin

DPI = 120


def reliability_plot(curves: Mapping[str, Sequence[ReliabilityBin]], title: str) -> bytes:
    """Said probability against the share that was so, one line for each of `curves`, examples below."""
    figure = Figure(figsize=(5, 6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    figure.subplots_adjust(left=0.14, right=0.96, top=0.94, bottom=0.09, hspace=0.08)
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    for name, bins in curves.items():
        said = [part.probability for part in bins]
        upper.plot(said, [part.share for part in bins], marker="o", markersize=4, label=name)
        lower.plot(said, [part.count for part in bins], marker="o", markersize=3)
    upper.set(title=title, ylabel="share of positive examples", xlim=(0, 1), ylim=(0, 1))
    upper.legend(loc="upper left")
    lower.set(xlabel="probability", ylabel="examples", yscale="log")
    buffer = io.BytesIO()
    # No version and no date in the file: the same figures give the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
