"""The results of a study, as figures and as tables: pure functions of its reports."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from training.evaluation.markdown import Row, describe_metrics, format_interval, table

FIGURES: Final = (
    "present_and_in_order",
    "presence",
    "order_given_presence",
    "reversed_given_presence",
    "silent",
    "clipped",
    "fad.tagger",
    "kad.tagger",
    "fad.clap-b",
    "kad.clap-b",
    "reward",
    "clap.clap-b",
)
"""Of the evaluation, by its names. `clap-b` neither trained anything here nor ranked."""
DRIFTS: Final = ("chosen_drift", "rejected_drift")
"""Of the trainings, at their end, where the method has a reference."""
COMPARED: Final = (
    "present_and_in_order",
    "presence",
    "order_given_presence",
    "silent",
    "clipped",
    "fad.tagger",
    "fad.clap-b",
)
"""Figures whose differences are reported with their intervals."""
SPLIT: Final = "all"
"""Of the prompts."""


def study_of(report: Mapping[str, Any], trainings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of a study, as in study.json.

    Args:
        report: of the evaluation; its first model is the start, the others are those of `trainings`.
        trainings: the training.json of each model, by its name, VARIANT-SEED.

    A figure is None if a model has none. A mean over seeds is None if one seed has none, so that all
    means are of as many.
    """
    measured = figures_of(report, trainings)
    start, *others = measured
    variants: dict[str, list[str]] = {}
    for name in others:
        variants.setdefault(name.rpartition("-")[0], []).append(name)
    ordered = [name for names in variants.values() for name in names]
    compared = [
        {
            "name": one["name"],
            "against": one["against"],
            "differences": {f: one["differences"].get(SPLIT, {}).get(f) for f in COMPARED},
        }
        for one in sorted(
            (one for one in report["comparisons"] if one["name"] in ordered),
            key=lambda one: ordered.index(one["name"]),
        )
    ]
    return {
        "prompts": report["prompts"] | {"from": _place(report["settings"])},
        "figures": {name: measured[name] for name in (start, *ordered)},
        "means": {
            variant: {figure: _mean([measured[name][figure] for name in names]) for figure in measured[start]}
            for variant, names in variants.items()
        },
        "differences": compared,
        "trainings": {
            name: {key: trainings[name][key] for key in ("stage", "steps", "data", "figures")}
            for name in ordered
        },
        "warnings": report["warnings"],
    }


def figures_of(
    report: Mapping[str, Any], trainings: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """The figures of each model, in the order of the report."""
    found: dict[str, dict[str, float | None]] = {}
    for model in report["models"]:
        name, figures = model["name"], model["figures"].get(SPLIT, {})
        ended = trainings[name]["figures"] if name in trainings else {}
        found[name] = {figure: (figures.get(figure) or {}).get("value") for figure in FIGURES}
        found[name] |= {drift: ended.get(drift) for drift in DRIFTS}
    return found


def figure_table(study: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Header and rows: the start, each training, then each method's mean over seeds."""
    rows = dict(study["figures"])
    rows |= {f"{variant}, mean": figures for variant, figures in study["means"].items()}
    columns = _known(rows.values(), (*FIGURES, *DRIFTS))
    return ["model", *columns], [
        [name, *(_number(figures[column]) for column in columns)] for name, figures in rows.items()
    ]


def difference_table(study: Mapping[str, Any], *, against_start: bool) -> tuple[Row, list[Row]]:
    """Header and rows of the differences to the start, or of those between methods, with their intervals."""
    start = next(iter(study["figures"]))
    found = [one for one in study["differences"] if (one["against"] == start) == against_start]
    columns = _known([one["differences"] for one in found], COMPARED)
    return ["difference", *columns], [
        [
            f"{one['name']} - {one['against']}",
            *(format_interval(one["differences"][column]) for column in columns),
        ]
        for one in found
    ]


def written_study(name: str, study: Mapping[str, Any]) -> str:
    """The whole study as Markdown."""
    prompts = study["prompts"]
    between = difference_table(study, against_start=False)
    lines = [
        f"# Study: {name}",
        "",
        f"{prompts['count']} prompts of {prompts['from']}, {prompts['clips']} clips of each model, the same "
        "prompts and seeds for all. A model is METHOD-SEED, by the seed of its training; a mean is over "
        "these seeds.",
        "",
        *(f"* Careful: {warning}." for warning in study["warnings"]),
        *([""] if study["warnings"] else []),
        *table(*figure_table(study)),
        "",
        "## Against the start",
        "",
        "Difference [95 % interval], by a bootstrap over prompts, paired on the same prompts and seeds. The "
        "interval is of one training: the seeds show how far trainings differ.",
        "",
        *table(*difference_table(study, against_start=True)),
    ]
    if between[1]:
        lines += ["", "## Against each other", "", *table(*between)]
    names = [*figure_table(study)[0][1:]]
    lines += ["", "## Figures", "", *describe_metrics(names)]
    if set(DRIFTS) & set(names):
        lines.append(
            "* `chosen_drift`, `rejected_drift` denoising error less the reference's at the end of training; "
            "both far above 0 is collapse"
        )
    return "\n".join([*lines, ""])


def _place(settings: Mapping[str, Any]) -> str:
    """Where the prompts are from."""
    return settings["prompts"] or f"the sound world's {settings['world.split']} split"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _known(rows: Any, columns: Sequence[str]) -> list[str]:
    """Those of `columns` that some row has a value in."""
    return [column for column in columns if any(row[column] is not None for row in rows)]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if 0 < abs(value) < 0.1 else f"{value:.3f}"
