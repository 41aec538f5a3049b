"""The ledger: every promotion is a run of MLflow's experiment ``milonga-promotions``, and stays there.

A run begins before anything is changed, and its tags say how far it came: each phase is written before it is
begun. So an entry without an outcome is a promotion that is under way, or whose promoter died; the latter is
what `resume` goes by. The lock, not the ledger, keeps two promotions apart.
"""

import datetime
import getpass
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from training.promotion.errors import BusyError
from training.promotion.registry import Registry, asking
from training.promotion.target import Pin, shown_pin
from training.tracking.register import experiment_id

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT: Final = "milonga-promotions"
EVIDENCE: Final = "evidence.json"
"""Artifact: what the gates measured, with intervals, and what they decided."""
GATES: Final = "gates.toml"
"""Artifact: the gates as they were."""

Kind = Literal["promotion", "rollback", "bootstrap"]
Phase = Literal["begun", "gates", "rollout", "verification", "alias", "restoring"]
"""How far it came. From `rollout` on the pin may have moved, and the gates were passed."""
Outcome = Literal["promoted", "rolled back", "bootstrapped", "refused", "failed", "interrupted"]
"""How it ended. The first three changed what is served, the others nothing."""

OUTCOMES: Final[Mapping[Kind, Outcome]] = {
    "promotion": "promoted",
    "rollback": "rolled back",
    "bootstrap": "bootstrapped",
}
"""How each kind ends when all is well."""
LATE: Final[frozenset[Phase]] = frozenset(("rollout", "verification", "alias"))
"""Phases that are finished, not undone, when the promoter dies in them."""

_PREFIX: Final = "milonga.promotion."
_TEXT_CHARACTERS: Final = 4_000


@dataclass(kw_only=True, slots=True)
class Entry:
    """One promotion, as the ledger has it."""

    ledger: "Ledger" = field(repr=False)
    run_id: str
    kind: Kind
    place: str
    """Of the target."""
    model: str
    """Name of the registered model."""
    alias: str
    """That says what is served."""
    alias_before: str | None
    """Version that the alias pointed to."""
    from_pin: Pin | None
    """What was served before; None where nothing was pinned."""
    to_pin: Pin
    """What is to be served."""
    who: str
    started: datetime.datetime
    phase: Phase = "begun"
    outcome: Outcome | None = None
    """None: not ended."""
    reason: str = ""
    """Why it did not come about."""
    ended: datetime.datetime | None = None

    def enter(self, phase: Phase, reason: str = "") -> None:
        """Write down that `phase` begins."""
        self.phase, self.reason = phase, reason or self.reason
        self.ledger.set_tags(self.run_id, {"phase": phase} | ({"reason": reason} if reason else {}))

    def attach(self, name: str, text: str) -> None:
        """Keep a file with it."""
        self.ledger.log_text(self.run_id, name, text)

    def close(self, outcome: Outcome, reason: str = "") -> None:
        """Write down how it ended; the outcome last, since that makes room for the next."""
        self.outcome, self.reason = outcome, reason
        self.ledger.end(self.run_id, well=outcome in OUTCOMES.values())
        self.ledger.set_tags(self.run_id, {"reason": reason, "outcome": outcome})


class Ledger:
    """The entries. Raises `ServiceUnavailableError` where the MLflow server does not answer."""

    def __init__(self, registry: Registry) -> None:
        self._client, self._uri = registry.client, registry.uri

    def begin(
        self,
        kind: Kind,
        *,
        place: str,
        model: str,
        alias: str,
        alias_before: str | None,
        from_pin: Pin | None,
        to_pin: Pin,
    ) -> Entry:
        """Write down that a promotion begins."""
        name = f"{kind}: {shown_pin(from_pin)} ▸ {shown_pin(to_pin)}"
        who = whoami()
        tags = {
            "kind": kind,
            "place": place,
            "model": model,
            "alias": alias,
            "alias_before": alias_before or "",
            "from": from_pin or "",
            "to": to_pin,
            "who": who,
            "phase": "begun",
        }
        with asking(self._uri):
            experiment = experiment_id(self._client, EXPERIMENT)
            run = self._client.create_run(
                experiment,
                run_name=name,
                tags={_PREFIX + key: value for key, value in tags.items()}
                | {"mlflow.user": who.partition("@")[0]},
            )
        entry = self._read(run)
        assert entry is not None
        return entry

    def entries(self, place: str | None = None) -> list[Entry]:
        """Entries, newest first: of one target, or of all."""
        with asking(self._uri):
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                return []
            runs = self._client.search_runs(
                [found.experiment_id],
                filter_string=f"tags.`{_PREFIX}place` = '{place}'" if place else "",
                order_by=["attributes.start_time DESC"],
                max_results=1_000,
            )
        return [entry for run in runs if (entry := self._read(run)) is not None]

    def unfinished(self, place: str) -> Entry | None:
        """The entry that has no outcome, if there is one."""
        return next((entry for entry in self.entries(place) if entry.outcome is None), None)

    def refuse_unfinished(self, place: str) -> None:
        """Raise `BusyError` where an earlier promotion was left unfinished."""
        entry = self.unfinished(place)
        if entry is not None:
            raise BusyError(
                f"the {entry.kind} {shown_pin(entry.from_pin)} ▸ {shown_pin(entry.to_pin)} of {entry.who} "
                f"({entry.started:%Y-%m-%d %H:%M} UTC) was left unfinished in the phase {entry.phase}; "
                "finish or undo it with `milonga promote resume`"
            )

    def before(self, place: str, pin: Pin) -> Pin | None:
        """What was served before `pin` was promoted; None where that is not known.

        Rollbacks are passed over, so that one after another goes further back, not to and fro.
        """
        for entry in self.entries(place):
            if entry.to_pin == pin and entry.outcome in ("promoted", "bootstrapped"):
                return entry.from_pin
        return None

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tag an entry's run."""
        with asking(self._uri):
            for key, value in tags.items():
                self._client.set_tag(run_id, _PREFIX + key, value[:_TEXT_CHARACTERS])

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """Keep a file with an entry's run."""
        with asking(self._uri):
            self._client.log_text(run_id, text, name)

    def read_text(self, run_id: str, name: str) -> str:
        """A file of an entry's run."""
        from mlflow.artifacts import load_text

        with asking(self._uri):
            text: str = load_text(f"runs:/{run_id}/{name}")
        return text

    def end(self, run_id: str, *, well: bool) -> None:
        """End an entry's run."""
        with asking(self._uri):
            self._client.set_terminated(run_id, "FINISHED" if well else "FAILED")

    def _read(self, run: "Run") -> Entry | None:
        tags = {
            key.removeprefix(_PREFIX): value
            for key, value in run.data.tags.items()
            if key.startswith(_PREFIX)
        }
        kind: Any = tags.get("kind")
        if kind not in get_args(Kind) or not tags.get("to"):
            return None  # somebody else's run
        phase: Any = tags.get("phase", "begun")
        outcome: Any = tags.get("outcome") or None
        return Entry(
            ledger=self,
            run_id=run.info.run_id,
            kind=kind,
            place=tags.get("place", ""),
            model=tags.get("model", ""),
            alias=tags.get("alias", ""),
            alias_before=tags.get("alias_before") or None,
            from_pin=tags.get("from") or None,
            to_pin=tags["to"],
            who=tags.get("who", ""),
            started=_time(run.info.start_time),
            phase=phase,
            outcome=outcome,
            reason=tags.get("reason", ""),
            ended=_time(run.info.end_time) if run.info.end_time else None,
        )


def history_lines(entries: Sequence[Entry]) -> list[str]:
    """Return the history as text: a table row per entry, and a second line with the reason of a failure."""
    rows = [["began (UTC)", "kind", "from", "to", "outcome", "seconds", "who"]]
    for entry in entries:
        seconds = "" if entry.ended is None else f"{(entry.ended - entry.started).total_seconds():.0f}"
        rows.append(
            [
                f"{entry.started:%Y-%m-%d %H:%M:%S}",
                entry.kind,
                *(shown_pin(pin).replace(" version ", "/") for pin in (entry.from_pin, entry.to_pin)),
                entry.outcome or f"unfinished ({entry.phase})",
                seconds,
                entry.who,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, reason in zip(rows, ["", *(entry.reason for entry in entries)], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if reason:
            lines.append(f"    {reason}")
    return lines


def history_json(entries: Sequence[Entry]) -> str:
    """The same for programs."""
    return json.dumps(
        [
            {
                "run": entry.run_id,
                "kind": entry.kind,
                "place": entry.place,
                "model": entry.model,
                "from": entry.from_pin,
                "to": entry.to_pin,
                "phase": entry.phase,
                "outcome": entry.outcome,
                "reason": entry.reason,
                "who": entry.who,
                "started": entry.started.isoformat(),
                "ended": None if entry.ended is None else entry.ended.isoformat(),
            }
            for entry in entries
        ]
    )


def whoami() -> str:
    """Who promotes, and from where; in a pod its name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "promoter"
    return f"{user}@{socket.gethostname()}"


def _time(milliseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, tz=datetime.UTC)
