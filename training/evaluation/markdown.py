"""Tables of an evaluation's report, and the report as Markdown."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from training.evaluation.report import is_better

DESCRIPTIONS: Mapping[str, str] = {
    "clap.": "CLAP score: cosine similarity of prompt and clip, -1 to 1",
    "reward": "reward: logit of the reward model",
    "fad.": "Fréchet distance to the references in this embedding space, 0 or more",
    "fd.": "Fréchet distance to the references in PANNs' embedding space, 0 or more",
    "kad.": "kernel audio distance to the references, ×100, about 0 for equal distributions",
    "kl.": "KL divergence of the tagger's posterior from the reference's, nats",
    "inception.": "inception score, 1 to the number of classes",
    "silent": "share of clips whose peak is below -40 dB of full scale",
    "clipped": "share of clips at full scale for more than a sample",
    "overshoot": "share of clips that reach full scale, or were turned down to it",
    "loudness_db": "root mean square, dB of full scale",
    "presence": "share of clips with all events of the prompt",
    "order_given_presence": "share in the prompt's order, of clips of sequences with all events",
    "reversed_given_presence": "share in the reverse order, of the same clips",
    "present_and_in_order": "share with all events, and in order if the prompt has one",
    "sequences_present_and_in_order": "the same, of prompts that have an order",
    "simultaneous_given_presence": "share that overlap, of clips with all events of prompts with while",
    "several_present": "share with all events, of prompts of several",
    "several_as_described": "share as described, of prompts of several events",
    "as_described": "share with all events, in order or at the same time as the prompt says",
    "round_trip_presence": "share of clips whose caption names all events of the prompt",
    "round_trip_order_given_presence": "share of these, of prompts with several events, whose caption has "
    "them in the prompt's order, or at the same time",
    "round_trip_present_and_in_order": "both",
    "asked": "probability with which a language model that takes audio says that the clip matches its prompt",
    "round_trip_nothing_else": "share of clips whose caption names no other event",
    "unused_words": "share of prompts with a phrase that changes less than a tenth of what all words do",
    "nothing_else_heard": "share without events that are not in the prompt",
}
"""Descriptions of metrics, by prefixes of their names."""

Row = list[str]


def metric_rows(report: Mapping[str, Any], split: str) -> tuple[Row, list[Row]]:
    """Return header and rows of the metrics of a split, a column per model."""
    models = [model for model in report["models"] if split in model["figures"]]
    names = list(dict.fromkeys(name for model in models for name in model["figures"][split]))
    header = ["figure", *(model["name"] for model in models)]
    return header, [
        [name, *(format_interval(model["figures"][split].get(name)) for model in models)] for name in names
    ]


def difference_rows(report: Mapping[str, Any], split: str) -> tuple[Row, list[Row]]:
    """Return header and rows of the differences of a split, better or worse if the interval excludes 0."""
    compared = [pair for pair in report["comparisons"] if split in pair["differences"]]
    names = list(dict.fromkeys(name for pair in compared for name in pair["differences"][split]))
    header = ["figure", *(f"{pair['name']} - {pair['against']}" for pair in compared)]
    rows = []
    for name in names:
        intervals = [pair["differences"][split].get(name) for pair in compared]
        rows.append([name, *(f"{format_interval(i)}{_better_or_worse(name, i)}" for i in intervals)])
    return header, rows


def markdown_report(report: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown."""
    prompts = report["prompts"]
    lines = [
        "# Evaluation",
        "",
        f"{prompts['count']} prompts, {prompts['clips']} clips per model, {prompts['references']} "
        "references. Mean [95 % interval] over prompts: score intervals of rates, a bootstrap for other "
        "means. Differences are paired by prompt and seed.",
        "",
        *(f"* {_model_line(model)}" for model in report["models"]),
    ]
    lines += ["", *(f"* Warning: {warning}." for warning in report["warnings"])] if report["warnings"] else []
    for split, clips in prompts["splits"].items():
        lines += [
            "",
            f"## {split[0].upper()}{split[1:]} ({clips} clips)",
            "",
            *table(*metric_rows(report, split)),
        ]
        if report["comparisons"]:
            lines += ["", *table(*difference_rows(report, split))]
    present = {name for model in report["models"] for part in model["figures"].values() for name in part}
    return "\n".join([*lines, "", "## Figures", "", *describe_metrics(present), ""])


def describe_metrics(names: Collection[str]) -> list[str]:
    """Return a line for each kind of metric among `names`."""
    return [
        f"* `{prefix}` {description}"
        for prefix, description in DESCRIPTIONS.items()
        if any(name.startswith(prefix) for name in names)
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def format_interval(interval: Mapping[str, float | None] | None) -> str:
    """Return ``value [low, high]``, or ``value`` without an interval, or a dash without a value."""
    if interval is None or interval["value"] is None:
        return "–"
    if interval["low"] is None or interval["high"] is None:
        return f"{interval['value']:.3f}"
    places = 4 if 0 < max(abs(interval["low"]), abs(interval["high"])) < 0.1 else 3
    return f"{interval['value']:.{places}f} [{interval['low']:.{places}f}, {interval['high']:.{places}f}]"


def _model_line(model: Mapping[str, Any]) -> str:
    identity = model["model"]
    version = (
        f", {identity['name']} {identity['version']}, `{identity['digest']}`" if "digest" in identity else ""
    )
    unreadable = f"; {len(model['unreadable'])} clips can't be read" if model["unreadable"] else ""
    return f"{model['name']}: `{model['source']}`{version}{unreadable}"


def _better_or_worse(name: str, interval: Mapping[str, float | None] | None) -> str:
    """Return " better", " worse", or "" if the interval contains 0."""
    if interval is None or None in (interval["value"], interval["low"], interval["high"]):
        return ""
    low, high, value = interval["low"], interval["high"], interval["value"]
    assert low is not None and high is not None and value is not None
    better = is_better(name, value)
    if low <= 0 <= high or better is None:
        return ""
    return " better" if better else " worse"
