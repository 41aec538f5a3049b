"""Tables and plots of a study, computed from the files of its result: seconds, and no model."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study2.config import BASE, METHODS
from benchmarks.study2.results import clip_metrics, comparisons, plain, read_inputs
from benchmarks.study2.scoring import KINDS, PRIMARY_KINDS
from services.files import write_atomically
from training.evaluation.markdown import format_interval, table
from training.evaluation.report import SplitMetrics, metric_differences, metric_intervals

STUDY, TABLES, GROWTH = "study.json", "study.md", "growth.png"
PRIMARY: Final = "present_and_in_order"
SECOND: Final = f"second.{PRIMARY}"
DISTANCES: Final = ("fad.tagger", "fad.yamnet")
"""Measures of sound quality, of the short clips; the first that a study has is used."""
TOLERANCE: Final = 1.1
"""Largest ratio of FAD to the start's that counts as keeping the sound."""

Study = dict[str, Any]


def tabulate(folder: Path) -> list[str]:
    """Write `STUDY`, `TABLES` and `GROWTH` from the three inputs in `folder`; return the result's lines."""
    study = study_of(*read_inputs(folder))
    write_atomically(folder / STUDY, json.dumps(study, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / TABLES, written(study))
    if study["growth"]:
        write_atomically(folder / GROWTH, growth_plot(study))
    return [*verdicts(study), str(folder / TABLES)]


def study_of(clips: Mapping[str, Any], sets: Mapping[str, Any], trained: Mapping[str, Any]) -> Study:
    """Return the content of study.json."""
    kinds = [kind for kind in KINDS if kind in clips["kinds"]]
    names = list(clips["kinds"][kinds[0]]["figures"])
    primary = [kind for kind in kinds if kind in PRIMARY_KINDS]
    splits = {"all": primary} | ({kind: [kind] for kind in kinds} if len(kinds) > 1 else {})
    found: Study = {"name": trained["name"], "start": trained["start"], "splits": {}}
    for split, parts in splits.items():
        metrics = {name: clip_metrics(clips, name, parts) for name in names}
        distances = sets[split if split in sets else kinds[0]]
        figures = {
            name: plain(metric_intervals(one)) | distances["figures"][name] for name, one in metrics.items()
        }
        differences = [
            {"name": name, "against": against}
            | {"figures": plain(metric_differences(metrics[against], metrics[name])) | of_sets["figures"]}
            for (name, against), of_sets in zip(comparisons(names), distances["differences"], strict=True)
        ]
        found["splits"][split] = {
            "prompts": len(set(metrics[BASE].prompts)),
            "clips": len(metrics[BASE].prompts),
            "figures": figures,
            "means": means(figures),
            "differences": differences,
            "pooled": pooled(metrics),
        }
    found["judges"] = agreement(clips, names, primary)
    found["growth"] = growth_of(found["splits"]["all"], trained["trainings"])
    found["trainings"] = {name: one["figures"] for name, one in trained["trainings"].items()}
    return found


def means(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by method the mean of each figure over training seeds, with the lowest and the highest."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        names = seeds_of(method, figures)
        for metric in figures[names[0]] if names else ():
            values = [figures[name].get(metric, {}).get("value") for name in names]
            if all(value is not None for value in values):
                summary = {"value": float(np.mean(values)), "low": min(values), "high": max(values)}
                found.setdefault(method, {})[metric] = summary
    return found


def seeds_of(method: str, names: Any) -> list[str]:
    """Return the models of a method, one per training seed."""
    return [name for name in names if name.rpartition("-")[0] == method and name.rpartition("-")[2].isdigit()]


def pooled(metrics: Mapping[str, SplitMetrics]) -> list[dict[str, Any]]:
    """Return differences of a method's mean over training seeds to the start and to SFT's mean.

    The interval is over prompts, with the trainings as they are.
    """
    # Without figures that are undefined for some clips: they are of other clips for each model.
    known = [
        metric
        for metric in metrics[BASE].values
        if all(np.isfinite(one.values[metric]).all() for one in metrics.values())
    ]
    averages: dict[str, SplitMetrics] = {}
    for method in (BASE, *METHODS):
        if names := [BASE] if method == BASE else seeds_of(method, metrics):
            values = {
                metric: np.mean([metrics[name].values[metric] for name in names], 0) for metric in known
            }
            averages[method] = replace(metrics[BASE], values=values)
    return [
        {"name": name, "against": against}
        | {"figures": plain(metric_differences(averages[against], averages[name]))}
        for against in (BASE, "sft")
        for name in averages
        if against in averages and name not in (BASE, against)
    ]


def agreement(clips: Mapping[str, Any], names: Sequence[str], kinds: Sequence[Any]) -> dict[str, Any] | None:
    """Return how often the two judges agree on the primary figure of a clip, and Cohen's kappa.

    None if there is one judge.
    """
    metrics = [clip_metrics(clips, name, kinds).values for name in names]
    if any(SECOND not in one for one in metrics):
        return None
    first = np.concatenate([one[PRIMARY] for one in metrics])
    second = np.concatenate([one[SECOND] for one in metrics])
    known = np.isfinite(first) & np.isfinite(second)
    first, second = first[known] > 0.5, second[known] > 0.5
    same = float((first == second).mean())
    chance = float(first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean()))
    kappa = (same - chance) / (1 - chance) if chance < 1 else None
    return {"clips": int(known.sum()), "same": same, "kappa": kappa}


def growth_of(split: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the gains over the start with the number of pairs, and with beta, in ascending order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in split["differences"]:
        kind, _, value = one["name"].rpartition("-")
        if one["against"] == BASE and kind in ("pairs", "beta"):
            row = {
                "value": float(value),
                "gain": one["figures"][PRIMARY],
                "second": one["figures"].get(SECOND),
                "fad": split["figures"][one["name"]][distance_of(split)]["value"],
                "chosen_drift": trained[one["name"]]["figures"].get("chosen_drift"),
            }
            found.setdefault(kind, []).append(row)
    return {kind: sorted(rows, key=lambda row: row["value"]) for kind, rows in found.items()}


def distance_of(split: Mapping[str, Any]) -> str:
    """Return the measure of sound quality of a study."""
    return next(name for name in DISTANCES if name in split["figures"][BASE])


def verdicts(study: Study) -> list[str]:
    """Return a line for each method: whether it beats start and SFT in all trainings, and keeps the sound."""
    split = study["splits"]["all"]
    distance = distance_of(split)
    start = split["figures"][BASE][distance]["value"]
    lines = []
    for method, figures in split["means"].items():
        names = seeds_of(method, split["figures"])
        lows = {
            against: [
                one["figures"][PRIMARY]["low"]
                for one in split["differences"]
                if one["name"] in names
                and one["against"].rpartition("-")[0] in (against, "")
                and (one["against"] == BASE) == (against == BASE)
            ]
            for against in (BASE, "sft")
        }
        beats = [
            f"{'above' if all(low > 0 for low in found) else 'not above'} {against}"
            for against, found in lows.items()
            if found
        ]
        ratio = figures[distance]["value"] / start
        kept = "keeps" if ratio <= TOLERANCE else "loses"
        lines.append(
            f"{method}: {PRIMARY} {figures[PRIMARY]['value']:.3f}, {', '.join(beats)} in all trainings; "
            f"{kept} the sound ({distance} × {ratio:.2f})"
        )
    return lines


COLUMNS: Final = (
    PRIMARY,
    SECOND,
    "presence",
    "order_given_presence",
    "reversed_given_presence",
    "simultaneous_given_presence",
    "second.simultaneous_given_presence",
    "as_described",
    "others",
    "fad.tagger",
    "fad.yamnet",
    "fad.clap-b",
    "kad.yamnet",
    "kad.clap-b",
    "silent",
    "clipped",
    "overshoot",
    "loudness_db",
    "reward",
    "clap.clap-b",
)
"""Figures of the tables, as far as there are. `as_described`: in order or simultaneous, as prompted."""
COMPARED: Final = (
    PRIMARY,
    SECOND,
    "presence",
    "order_given_presence",
    "as_described",
    "fad.tagger",
    "fad.yamnet",
    "fad.clap-b",
    "silent",
)


def written(study: Study) -> str:
    """Return the study as Markdown."""
    lines = [f"# Study: {study['name']}", "", *(f"* {line}" for line in verdicts(study)), ""]
    for split, found in study["splits"].items():
        lines += [f"## {split}: {found['prompts']} prompts, {found['clips']} clips of each model", ""]
        names = [name for name in COLUMNS if name in found["figures"][BASE]]
        rows = [[BASE, *(_number(found["figures"][BASE].get(name)) for name in names)]]
        rows += [
            [method, *(_range(figures.get(name)) for name in names)]
            for method, figures in found["means"].items()
        ]
        lines += [*table(["mean over seeds [lowest, highest]", *names], rows), ""]
        compared = [name for name in COMPARED if name in names]
        for title, differences in (
            ("Each training", found["differences"]),
            ("All trainings", found["pooled"]),
        ):
            rows = [
                [f"{one['name']} - {one['against']}", *(_signed(one["figures"].get(n)) for n in compared)]
                for one in differences
            ]
            lines += [f"{title}, difference [95 %]:", "", *table(["", *compared], rows), ""]
    if same := study["judges"]:
        kappa = "–" if same["kappa"] is None else f"{same['kappa']:.2f}"
        lines += [f"The judges agree on {same['same']:.3f} of {same['clips']} clips (kappa {kappa}).", ""]
    for kind, rows in study["growth"].items():
        lines += [f"## Gain with {kind}", ""]
        cells = [
            [
                f"{row['value']:g}",
                _signed(row["gain"]),
                _signed(row["second"]),
                f"{row['fad']:.2f}",
                "–" if row["chosen_drift"] is None else f"{row['chosen_drift']:+.3f}",
            ]
            for row in rows
        ]
        lines += [
            *table([kind, PRIMARY, SECOND, distance_of(study["splits"]["all"]), "chosen_drift"], cells),
            "",
        ]
    return "\n".join(lines)


def growth_plot(study: Study) -> bytes:
    """Return a plot of the gains, with the start's FAD as 1 on the second axis."""
    split = study["splits"]["all"]
    start = split["figures"][BASE][distance_of(split)]["value"]
    titles = {"pairs": "number of pairs", "beta": "beta"}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for position, (kind, rows) in enumerate(study["growth"].items(), start=1):
        axes = figure.add_subplot(1, len(study["growth"]), position)
        values = [row["value"] for row in rows]
        for key, label in (("gain", "tagger"), ("second", "second judge")):
            if any(row[key] is None for row in rows):
                continue
            gains = [row[key]["value"] for row in rows]
            spans = [
                [row[key]["value"] - row[key]["low"] for row in rows],
                [row[key]["high"] - row[key]["value"] for row in rows],
            ]
            axes.errorbar(values, gains, yerr=spans, marker="o", capsize=3, label=label)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel=titles[kind], ylabel="gain, present and in order")
        other = axes.twinx()
        other.plot(values, [row["fad"] / start for row in rows], "k--", label="FAD")
        other.set_ylabel("FAD / the start's")
        axes.legend(loc="best", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _number(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    value = float(interval["value"])
    return f"{value:.4f}" if 0 < abs(value) < 0.05 else f"{value:.3f}"


def _range(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "–"
    ends = (_number({"value": summary["low"]}), _number({"value": summary["high"]}))
    return _number(summary) if ends[0] == ends[1] else f"{_number(summary)} [{ends[0]}, {ends[1]}]"


def _signed(interval: Mapping[str, Any] | None) -> str:
    text = format_interval(interval)
    return f"+{text}" if interval and (interval["value"] or 0) > 0 else text
