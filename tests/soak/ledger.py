"""Whether clients and services agree on every call: by request id, and in their counts.

The service's side is its log, which has a line per call even where the process was killed, and its counters,
as they were last read. Of refusals the log has ten lines a second, and counts the others.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.soak.load import STUCK, Call
from tests.soak.processes import Incarnation, Line
from tests.soak.schedule import RESTARTING, TOXIC, Fault
from tests.soak.vanishing import PREFIX

REFUSALS: Final = ("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED")
"""Codes of which not every line is in the log."""
_AFTER_SECONDS: Final = 3.0
"""How long after its end a fault still explains what a call came to: connections are made again."""
_LATE_SECONDS: Final = 0.5
"""Time before a deadline in which both sides may see different ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The time of a fault, from its beginning until the service answers as before."""

    fault: Fault
    service: str
    start: float
    end: float

    def explains(self, call: Call) -> bool:
        """Return whether the fault was there during the call."""
        applies = self.fault not in TOXIC or call.attempt.proxied
        overlaps = call.start <= self.end + _AFTER_SECONDS and call.end >= self.start
        return self.service == call.attempt.service and applies and overlaps


@dataclass(kw_only=True, slots=True)
class Ledger:
    """What the two sides say, compared."""

    agreed: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    """Differences by their explanation."""
    unexplained: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    """Codes that no call should have, while nothing was done to its service."""
    table: dict[tuple[str, str, str], dict[str, int]] = field(default_factory=dict)
    """Counts by service, rpc and code: what clients saw, what logs have, what the counters had."""


def read_lines(incarnation: Incarnation) -> tuple[list[Line], int]:
    """Return the lines of calls in a log, and how many refusals it says that it left out."""
    lines: list[Line] = []
    left_out = 0
    for event in incarnation.events():
        if event.get("event") == "call":
            lines.append(
                Line(
                    request_id=event["request_id"], rpc=event["rpc"], code=event["code"],
                    seconds=event["seconds"],
                )
            )  # fmt: skip
            left_out += event.get("refusals_not_logged", 0)
    return lines, left_out


def compare(calls: Sequence[Call], incarnations: Sequence[Incarnation], windows: Sequence[Window]) -> Ledger:
    """Compare both sides of a run in which every process has ended."""
    ledger = Ledger()
    lines: dict[str, Line] = {}
    for incarnation in incarnations:
        found, left_out = read_lines(incarnation)
        lines |= {line.request_id: line for line in found}
        _compare_counters(ledger, incarnation, found, left_out)
    for call in calls:
        reasons = [window.fault for window in windows if window.explains(call)]
        _count(ledger, call.attempt.service, call.attempt.rpc, call.code, "clients")
        line = lines.pop(call.request_id, None)
        _compare_call(ledger, call, line, reasons)
        if call.code not in call.attempt.codes and not reasons:
            ledger.surprises.append(describe(call, line))
    for line in lines.values():
        if line.request_id.startswith(PREFIX):
            ledger.explained["the client vanished"] += 1
        else:
            ledger.unexplained.append(f"{line.request_id} {line.rpc}: {line.code}, of no client")
    return ledger


def describe(call: Call, line: Line | None) -> str:
    """Return one line on a call."""
    seen = (
        "no line in the log" if line is None else f"the service says {line.code} after {line.seconds:.2f} s"
    )
    deadline = "" if call.attempt.timeout is None else f", deadline {call.attempt.timeout:g} s"
    return (
        f"{call.request_id} {call.attempt.service} {call.attempt.kind} by {call.attempt.caller.name}: "
        f"{call.code} after {call.end - call.start:.2f} s{deadline}"
        f"{', proxied' if call.attempt.proxied else ''}; {seen}; {call.details[:160]}"
    )


def _compare_call(ledger: Ledger, call: Call, line: Line | None, reasons: Sequence[Fault]) -> None:
    if line is not None and line.code == call.code:
        ledger.agreed += 1
        return
    explanation = explain(call, line, reasons)
    if explanation is None:
        ledger.unexplained.append(describe(call, line))
    else:
        ledger.explained[explanation] += 1


def explain(call: Call, line: Line | None, reasons: Iterable[Fault]) -> str | None:
    """Return why a client saw another end of its call than the service; None: there is no good reason.

    `line` is the service's, None if there is none; `reasons` are the faults during the call.
    """
    faults = sorted(set(reasons))
    during = f"during: {faults[0]}" if faults else None
    if call.code == STUCK:
        return during
    if call.code == "CANCELLED" and call.left:
        return "the caller cancelled before it arrived" if line is None else "ended as its caller cancelled"
    if line is None:
        return "refused, not logged" if call.code in REFUSALS else during
    if (
        call.code == "RESOURCE_EXHAUSTED"
        and line.code in ("CANCELLED", "OK")
        and call.attempt.rpc == "ModelStreamInfer"
    ):
        # The service does not learn why the stream ended: to some calls it looks like its regular end.
        return "a message of a stream over the size limit"
    if call.code == "DEADLINE_EXCEEDED" and call.attempt.timeout is not None:
        if call.attempt.pause and line.code == "OK":
            return "the answer was sent, and not read by its deadline"
        if line.seconds >= call.attempt.timeout - _LATE_SECONDS:
            return "ended as its deadline passed"
        return during
    if call.code == "OK":
        timeout = call.attempt.timeout
        is_late = timeout is not None and call.end - call.start >= timeout - _LATE_SECONDS
        return "answered as its deadline passed" if is_late and line.code == "DEADLINE_EXCEEDED" else None
    # An answer that was given in vain: the connection broke, or the process died before it was sent.
    ends = {*RESTARTING, *TOXIC} - {Fault.DRAIN}
    return during if line.code != "OK" or ends.intersection(faults) else None


def _compare_counters(ledger: Ledger, incarnation: Incarnation, lines: Sequence[Line], left_out: int) -> None:
    """Compare the counters of a process, as they were last read, with its log."""
    logged = Counter((line.rpc, line.code) for line in lines)
    counted = Counter(incarnation.gauges.counts)
    name = f"{incarnation.name}-{incarnation.number}"
    for (rpc, code), count in logged.items():
        _count(ledger, incarnation.name, rpc, code, "logs", count)
    for (rpc, code), count in counted.items():
        _count(ledger, incarnation.name, rpc, code, "counters", count)
    refusals = {key for key in logged | counted if key[1] in REFUSALS}
    for key in (logged | counted).keys() - refusals:
        # Of a process that a fault ended, the last calls were counted after the counters were last read.
        missing = logged[key] - counted[key]
        if missing < 0 or (missing and not incarnation.ending):
            ledger.unexplained.append(
                f"{name}: {key} is {counted[key]} in the counters, {logged[key]} in the log"
            )
        ledger.explained["counted after the last look at the counters of a process that a fault ended"] += (
            missing
        )
    missing = sum(counted[key] - logged[key] for key in refusals) - left_out
    if missing > 0 and not incarnation.ending:
        # The number of those that were left out last is in no line yet.
        ledger.explained["refused, and not yet in a line of the log"] += missing


def _count(ledger: Ledger, service: str, rpc: str, code: str, side: str, count: int = 1) -> None:
    row = ledger.table.setdefault((service, rpc, code), {"clients": 0, "logs": 0, "counters": 0})
    row[side] += count


def as_json(ledger: Ledger) -> Mapping[str, Any]:
    """Return a ledger for a JSON file."""
    return {
        "agreed": ledger.agreed,
        "explained": dict(ledger.explained),
        "unexplained": ledger.unexplained,
        "surprises": ledger.surprises,
        "counts": [
            {"service": service, "rpc": rpc, "code": code, **row}
            for (service, rpc, code), row in sorted(ledger.table.items())
        ],
    }
