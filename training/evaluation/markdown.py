"""An evaluation's report as tables: for a terminal, and as Markdown."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from training.evaluation.report import is_better

MEANINGS: Mapping[str, str] = {
    "clap.": "CLAP score: cosine of text and clip, -1 to 1",
    "reward": "reward: logit of the reward model",
    "fad.": "Fréchet distance to the references in that space, 0 or more",
    "fd.": "Fréchet distance to the references by PANNs, 0 or more",
    "kad.": "kernel audio distance to the references, ×100, about 0 where nothing differs",
    "kl.": "KL divergence of the tagger's posterior from the reference's, nats",
    "inception.": "inception score, 1 to the number of classes",
    "silent": "share of clips whose peak is below -40 dB of full scale",
    "clipped": "share of clips at full scale",
    "loudness_db": "root mean square, dB of full scale",
    "presence": "share of clips in which all events of the prompt are heard",
    "order_given_presence": "of the clips of sequences with all events: share in the prompt's order",
    "reversed_given_presence": "of the same: share in the reverse order",
    "present_and_in_order": "share with all events, and in order where the prompt has one",
    "sequences_present_and_in_order": "the same, of the prompts that have an order",
    "nothing_else_heard": "share without any event that the prompt does not name",
}
"""What figures mean, by what their names begin with."""

Row = list[str]


def figure_rows(report: Mapping[str, Any], split: str) -> tuple[Row, list[Row]]:
    """Header and rows of the figures of a split, a column a model."""
    models = [model for model in report["models"] if split in model["figures"]]
    names = list(dict.fromkeys(name for model in models for name in model["figures"][split]))
    header = ["figure", *(model["name"] for model in models)]
    return header, [
        [name, *(written(model["figures"][split].get(name)) for model in models)] for name in names
    ]


def difference_rows(report: Mapping[str, Any], split: str) -> tuple[Row, list[Row]]:
    """Header and rows of the differences of a split; better or worse where the interval excludes 0."""
    found = [one for one in report["comparisons"] if split in one["differences"]]
    names = list(dict.fromkeys(name for one in found for name in one["differences"][split]))
    header = ["figure", *(f"{one['name']} - {one['against']}" for one in found)]
    rows = []
    for name in names:
        intervals = [one["differences"][split].get(name) for one in found]
        rows.append([name, *(f"{written(part)}{_verdict(name, part)}" for part in intervals)])
    return header, rows


def written_report(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    prompts = report["prompts"]
    lines = [
        "# Evaluation",
        "",
        f"{prompts['count']} prompts, {prompts['clips']} clips of each model, {prompts['references']} "
        "references. Mean [95 % interval]; intervals by a bootstrap over prompts, differences paired on the "
        "same prompts and seeds.",
        "",
        *(f"* {_model_line(model)}" for model in report["models"]),
    ]
    lines += ["", *(f"* Careful: {warning}." for warning in report["warnings"])] if report["warnings"] else []
    for split, clips in prompts["splits"].items():
        lines += [
            "",
            f"## {split[0].upper()}{split[1:]} ({clips} clips)",
            "",
            *table(*figure_rows(report, split)),
        ]
        if report["comparisons"]:
            lines += ["", *table(*difference_rows(report, split))]
    present = {name for model in report["models"] for part in model["figures"].values() for name in part}
    return "\n".join([*lines, "", "## Figures", "", *meanings(present), ""])


def meanings(names: Collection[str]) -> list[str]:
    """A line for each kind of figure among `names`."""
    used = {k: m for k, m in MEANINGS.items() if any(name.startswith(k) for name in names)}
    return [f"* `{key}` {meaning}" for key, meaning in used.items()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def written(interval: Mapping[str, float | None] | None) -> str:
    """A figure as ``value [low, high]``, without the interval where it has none; a dash for no figure."""
    if interval is None or interval["value"] is None:
        return "–"
    if interval["low"] is None or interval["high"] is None:
        return f"{interval['value']:.3f}"
    places = 4 if 0 < max(abs(interval["low"]), abs(interval["high"])) < 0.1 else 3
    return f"{interval['value']:.{places}f} [{interval['low']:.{places}f}, {interval['high']:.{places}f}]"


def _model_line(model: Mapping[str, Any]) -> str:
    identity = model["model"]
    known = (
        f", {identity['name']} {identity['version']}, `{identity['digest']}`" if "digest" in identity else ""
    )
    unreadable = f"; {len(model['unreadable'])} clips can't be read" if model["unreadable"] else ""
    return f"{model['name']}: `{model['source']}`{known}{unreadable}"


def _verdict(name: str, interval: Mapping[str, float | None] | None) -> str:
    """Nothing, where the interval holds 0."""
    if interval is None or None in (interval["value"], interval["low"], interval["high"]):
        return ""
    low, high, value = interval["low"], interval["high"], interval["value"]
    assert low is not None and high is not None and value is not None
    better = is_better(name, value)
    if low <= 0 <= high or better is None:
        return ""
    return " better" if better else " worse"
