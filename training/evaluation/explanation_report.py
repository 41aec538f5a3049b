"""Write the report of an evaluation of explanations as tables."""

import math
from collections.abc import Mapping
from typing import Any, Final

TABLES: Final = "report.md"

FIGURES: Final = {
    "mass_inside": "mass inside",
    "pointing": "pointing game",
    "average_precision": "average precision",
    "iou": "IoU",
    "specificity": "specificity",
    "function_words": "function words",
    "deletion": "deletion",
    "insertion": "insertion",
    "rank_correlation": "rank correlation with occlusion",
    "iterations": "iterations",
}
"""Figures in the order of the tables, with their titles."""

_NONE: Final = "–"


def markdown(report: Mapping[str, Any]) -> str:
    """Return the tables of a report: one per kind of clips, a row per figure, a column per method."""
    clips = ", ".join(f"{count} {kind}" for kind, count in report["clips"].items())
    lines = [
        f"{report['model']} ({report['digest'][:19]}): {clips}. Mean [95 % interval over clips], and in "
        "parentheses what chance gives.",
    ]
    for kind, methods in report["figures"].items():
        lines += ["", f"### {kind[0].upper()}{kind[1:]}", "", "| | " + " | ".join(methods) + " |"]
        lines.append("|---|" + "---|" * len(methods))
        for name, title in FIGURES.items():
            cells = [_cell(table.get(name)) for table in methods.values()]
            if any(cell != _NONE for cell in cells):
                lines.append(f"| {title} | {' | '.join(cells)} |")
    for kind, pairs in report["comparisons"].items():
        lines += ["", f"### Differences on {kind} clips, paired", ""]
        names = list(next(iter(pairs.values())))
        lines.append("| | " + " | ".join(FIGURES[name] for name in names) + " |")
        lines.append("|---|" + "---|" * len(names))
        lines += [
            f"| {pair} | " + " | ".join(_interval(found[name], sign=True) for name in names) + " |"
            for pair, found in pairs.items()
        ]
    return "\n".join(lines) + "\n"


def _cell(figure: Mapping[str, Any] | None) -> str:
    # Occlusion and attention take no iterations.
    if figure is None or ("chance" not in figure and not figure["value"]["value"]):
        return _NONE
    chance = f" ({figure['chance']:.2f})" if "chance" in figure else ""
    return _interval(figure["value"]) + chance


def _interval(found: Mapping[str, float | None], *, sign: bool = False) -> str:
    value, low, high = found["value"], found["low"], found["high"]
    if value is None or low is None or high is None or math.isnan(value):
        return _NONE
    form = "+.3f" if sign else ".3f"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
