"""The report of a soak run: a page, the same as JSON, and a plot of the memory."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine
from tests.soak import ledger as ledgers
from tests.soak.growth import Growth, growth
from tests.soak.ledger import Ledger, Window
from tests.soak.load import Bits, Call
from tests.soak.processes import Incarnation


@dataclass(kw_only=True)
class Outcome:
    """Everything that a run found."""

    seed: int
    minutes: float
    """Of load."""
    planned: float
    proxy: str
    """Version of toxiproxy, or why there was none."""
    started: float
    calls: Sequence[Call]
    bits: Bits
    windows: Sequence[Window]
    incarnations: Sequence[Incarnation]
    ledger: Ledger
    endings: Sequence[str]
    """How processes ended that a fault was to end."""
    left: Mapping[str, Mapping[str, float]]
    """What was in progress at the end, by service."""
    faults: list[str] = field(default_factory=list)
    """What is wrong."""

    @property
    def growths(self) -> dict[str, Growth | None]:
        """Return the growth of each service's last process."""
        last = {incarnation.name: incarnation for incarnation in self.incarnations}
        return {name: growth(one.samples, one.started) for name, one in last.items()}

    def judge(self) -> None:
        """Fill `faults`."""
        for name, kind in (("unexplained", self.ledger.unexplained), ("unexpected", self.ledger.surprises)):
            self.faults += [f"{name}: {one}" for one in kind]
        for name, found in self.growths.items():
            self.faults += [f"{name}: {fault}" for fault in ([] if found is None else found.faults)]
        self.faults += [
            f"{name}: left in the engine: {dict(left)}" for name, left in self.left.items() if left
        ]
        for one in self.incarnations:
            errors = one.faults().items()
            self.faults += [f"{one.name}-{one.number} logged {count} times: {text}" for text, count in errors]
        if self.bits.different:
            self.faults.append(f"{self.bits.different} of {self.bits.compared} clips differ from the first")


def write(outcome: Outcome, folder: Path) -> None:
    """Write `report.md`, `report.json` and `rss.png`."""
    figures = _figures(outcome)
    (folder / "report.json").write_text(json.dumps(figures) + "\n")
    plot(outcome, folder / "rss.png")
    (folder / "report.md").write_text(_page(outcome, figures))


def _figures(outcome: Outcome) -> dict[str, Any]:
    kinds: dict[str, Counter[str]] = {}
    for call in outcome.calls:
        kinds.setdefault(f"{call.attempt.service}: {call.attempt.kind}", Counter())[call.code] += 1
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "seed": outcome.seed,
        "minutes": round(outcome.minutes, 2),
        "planned_minutes": outcome.planned,
        "toxiproxy": outcome.proxy,
        "passed": not outcome.faults,
        "faults": outcome.faults,
        "calls": len(outcome.calls),
        "codes": dict(Counter(call.code for call in outcome.calls).most_common()),
        "kinds": {kind: dict(codes.most_common()) for kind, codes in sorted(kinds.items())},
        "schedule": [
            {
                "at": round(window.start - outcome.started, 1),
                "service": window.service,
                "fault": str(window.fault),
                "seconds": round(window.end - window.start, 1),
            }
            for window in outcome.windows
        ],
        "endings": list(outcome.endings),
        "left": {name: dict(left) for name, left in outcome.left.items()},
        "same_bits": {"compared": outcome.bits.compared, "different": outcome.bits.different},
        "growth": {name: found and asdict(found) for name, found in outcome.growths.items()},
        "memory": {
            f"{one.name}-{one.number}": [
                (round(sample.at - outcome.started, 1), round(sample.rss / 2**20, 1))
                for sample in one.samples
            ]
            for one in outcome.incarnations
        },
        "ledger": ledgers.as_json(outcome.ledger),
    }


def plot(outcome: Outcome, path: Path) -> None:
    """Draw the memory of every process over time, and the faults."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    names = sorted({incarnation.name for incarnation in outcome.incarnations})
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for incarnation in outcome.incarnations:
        axes.plot(
            [(sample.at - outcome.started) / 60 for sample in incarnation.samples],
            [sample.rss / 2**20 for sample in incarnation.samples],
            color=colours[incarnation.name],
            linewidth=1,
            label=incarnation.name if incarnation.number == 0 else None,
        )
    for window in outcome.windows:
        axes.axvline(
            (window.start - outcome.started) / 60, color=colours[window.service], alpha=0.2, linewidth=1
        )
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _codes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in counts.items())


def _page(outcome: Outcome, figures: Mapping[str, Any]) -> str:
    ledger = outcome.ledger
    verdict = "Everything held." if not outcome.faults else f"**{len(outcome.faults)} faults.**"
    per_fault = Counter(str(window.fault) for window in outcome.windows)
    growths = [
        (name, *(["too short to say"] + [""] * 4 if found is None else [
            f"{found.rss_mib:.0f} MiB", f"{found.slope:+.1f} ± {found.error:.1f} MiB/h",
            f"{found.minutes:.1f}", " → ".join(map(str, found.threads)),
            " → ".join(map(str, found.descriptors)),
        ]))
        for name, found in outcome.growths.items()
    ]  # fmt: skip
    counts = [
        (service, rpc, code, row["clients"], row["logs"], row["counters"])
        for (service, rpc, code), row in sorted(ledger.table.items())
    ]
    sections = [
        "# Soak run\n",
        f"{verdict} {figures['date']}, {figures['machine']}; {outcome.minutes:.1f} minutes of load, "
        f"{len(outcome.calls)} calls, {len(outcome.windows)} faults; toxiproxy: {outcome.proxy}.\n\n"
        f"To repeat it: `make soak MINUTES={outcome.planned:g} SEED={outcome.seed}`.\n",
    ]
    if outcome.faults:
        sections.append("## What is wrong\n\n" + "".join(f"* {fault}\n" for fault in outcome.faults[:100]))
    sections += [
        "## Calls\n\n" + _table(("call", "codes that clients saw"), [
            (kind, _codes(codes)) for kind, codes in figures["kinds"].items()
        ]),
        "## Faults\n\n" + _table(("fault", "times"), sorted(per_fault.items()))
        + "\n" + "".join(f"* {ending}\n" for ending in outcome.endings),
        "## Clients and services\n\n"
        f"On {ledger.agreed} calls both sides agree. Differences, and their explanations:\n\n"
        + _table(("explanation", "calls"), [
            *ledger.explained.most_common(), ("none", len(ledger.unexplained))
        ])
        + "\nCounts by rpc and code: what clients saw, what the services logged, and what their counters had "
        "when they were last read. Killed processes lose their counters, vanished clients see nothing.\n\n"
        + _table(("service", "rpc", "code", "clients", "logs", "counters"), counts),
        "## Afterwards\n\n"
        f"In progress or queued: {sum(map(len, outcome.left.values())) or 'nothing'}. Equal bits: "
        f"{outcome.bits.compared - outcome.bits.different} of {outcome.bits.compared} answers to repeated "
        "requests.\n\n"
        + _table(
            ("service", "memory", "slope, 99 % interval", "minutes fitted", "threads", "descriptors"), growths
        )
        + "\nOf each service's last process, after the first two fifths of its life; threads and descriptors "
        "are the maxima of the first and the second half.\n\n![Memory of every process](rss.png)\n",
    ]  # fmt: skip
    return "\n".join(sections)
