"""The ledger: each promotion is a run of MLflow's experiment ``milonga-promotions``.

A run is created before anything is changed, and its tags record each phase before it starts. So an entry
without an outcome is a promotion that runs, or whose promoter died, which `resume` completes. Two promotions
are kept apart by the lock, not by the ledger.
"""

import datetime
import getpass
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from services.weights.promotions import LEDGER, LEDGER_TAG
from training.promotion.errors import BusyError
from training.promotion.registry import Registry, mlflow_errors
from training.promotion.target import Pin, shown_pin
from training.tracking.register import experiment_id

if TYPE_CHECKING:
    from mlflow.entities import Run

    from training.promotion.gates.examination import Look

EVIDENCE: Final = "evidence.json"
"""Artifact: the gates' measurements with confidence intervals, and their verdicts."""
GATES: Final = "gates.toml"
"""Artifact: the file of gates."""

Kind = Literal["promotion", "rollback", "bootstrap"]
Phase = Literal["begun", "gates", "rollout", "verification", "alias", "restoring"]
"""Progress of a promotion. From `rollout` on the gates have passed, and the pin may have changed."""
Outcome = Literal["promoted", "rolled back", "bootstrapped", "refused", "failed", "interrupted"]
"""Result of a promotion. The first three changed what is served, the others nothing."""

OUTCOMES: Final[Mapping[Kind, Outcome]] = {
    "promotion": "promoted",
    "rollback": "rolled back",
    "bootstrap": "bootstrapped",
}
"""Outcome of success by kind."""
LATE: Final[frozenset[Phase]] = frozenset(("rollout", "verification", "alias"))
"""Phases that `resume` completes instead of undoing them."""

_TEXT_CHARACTERS: Final = 4_000


@dataclass(kw_only=True, slots=True)
class LedgerEntry:
    """One promotion in the ledger."""

    ledger: "Ledger" = field(repr=False)
    run_id: str
    kind: Kind
    place: str
    """Name of the target."""
    model: str
    """Name of the registered model."""
    alias: str
    """Alias of the version that is served."""
    alias_before: str | None
    """Version that the alias pointed to before."""
    from_pin: Pin | None
    """Pin that was served before; None if nothing was pinned."""
    to_pin: Pin
    """Pin to roll out."""
    who: str
    """User and host of the promoter."""
    started: datetime.datetime
    phase: Phase = "begun"
    look: str = ""
    """The last look of the gates and its outcome."""
    outcome: Outcome | None = None
    """None: unfinished."""
    reason: str = ""
    """Why it failed."""
    ended: datetime.datetime | None = None

    def enter(self, phase: Phase, reason: str = "") -> None:
        """Record that `phase` starts."""
        self.phase, self.reason = phase, reason or self.reason
        self.ledger.set_tags(self.run_id, {"phase": phase} | ({"reason": reason} if reason else {}))

    def look_at(self, look: "Look") -> None:
        """Record a look of the gates: its outcome as a tag, its verdicts as a file."""
        self.look = str(look)
        self.ledger.set_tags(self.run_id, {"look": self.look})
        self.attach(f"look-{look.number}.json", json.dumps(look.row(), indent=1, allow_nan=False))

    def attach(self, name: str, text: str) -> None:
        """Attach a file to the entry."""
        self.ledger.log_text(self.run_id, name, text)

    def close(self, outcome: Outcome, reason: str = "") -> None:
        """Record the outcome, as the last tag: from then on another promotion may start."""
        self.outcome, self.reason = outcome, reason
        self.ledger.end(self.run_id, success=outcome in OUTCOMES.values())
        self.ledger.set_tags(self.run_id, {"reason": reason, "outcome": outcome})


class Ledger:
    """All promotions. Methods raise `ServiceUnavailableError` where the MLflow server does not answer."""

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
    ) -> LedgerEntry:
        """Create the entry of a promotion that starts."""
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
        with mlflow_errors(self._uri):
            experiment = experiment_id(self._client, LEDGER)
            run = self._client.create_run(
                experiment,
                run_name=name,
                tags={LEDGER_TAG + key: value for key, value in tags.items()}
                | {"mlflow.user": who.partition("@")[0]},
            )
        entry = self._read(run)
        assert entry is not None
        return entry

    def entries(self, place: str | None = None) -> list[LedgerEntry]:
        """Return the entries of one target, or of all, newest first."""
        with mlflow_errors(self._uri):
            found = self._client.get_experiment_by_name(LEDGER)
            if found is None:
                return []
            runs = self._client.search_runs(
                [found.experiment_id],
                filter_string=f"tags.`{LEDGER_TAG}place` = '{place}'" if place else "",
                order_by=["attributes.start_time DESC"],
                max_results=1_000,
            )
        return [entry for run in runs if (entry := self._read(run)) is not None]

    def unfinished(self, place: str) -> LedgerEntry | None:
        """Return the newest entry without an outcome; None if there is none."""
        return next((entry for entry in self.entries(place) if entry.outcome is None), None)

    def refuse_unfinished(self, place: str) -> None:
        """Raise `BusyError` if an earlier promotion was left unfinished."""
        entry = self.unfinished(place)
        if entry is not None:
            raise BusyError(
                f"the {entry.kind} {shown_pin(entry.from_pin)} ▸ {shown_pin(entry.to_pin)} of {entry.who} "
                f"({entry.started:%Y-%m-%d %H:%M} UTC) was left unfinished in the phase {entry.phase}; "
                "complete or undo it with `milonga promote resume`"
            )

    def before(self, place: str, pin: Pin) -> Pin | None:
        """Return the pin that was served before `pin` was promoted; None if that is not recorded.

        Rollbacks are skipped, so that two of them in a row go two versions back.
        """
        for entry in self.entries(place):
            if entry.to_pin == pin and entry.outcome in ("promoted", "bootstrapped"):
                return entry.from_pin
        return None

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of an entry's run."""
        with mlflow_errors(self._uri):
            for key, value in tags.items():
                self._client.set_tag(run_id, LEDGER_TAG + key, value[:_TEXT_CHARACTERS])

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """Attach a file to an entry's run."""
        with mlflow_errors(self._uri):
            self._client.log_text(run_id, text, name)

    def read_text(self, run_id: str, name: str) -> str:
        """Return the content of a file attached to an entry's run."""
        from mlflow.artifacts import load_text

        with mlflow_errors(self._uri):
            text: str = load_text(f"runs:/{run_id}/{name}")
        return text

    def end(self, run_id: str, *, success: bool) -> None:
        """Terminate an entry's run."""
        with mlflow_errors(self._uri):
            self._client.set_terminated(run_id, "FINISHED" if success else "FAILED")

    def _read(self, run: "Run") -> LedgerEntry | None:
        tags = {
            key.removeprefix(LEDGER_TAG): value
            for key, value in run.data.tags.items()
            if key.startswith(LEDGER_TAG)
        }
        kind: Any = tags.get("kind")
        if kind not in get_args(Kind) or not tags.get("to"):
            return None  # a run of another program
        phase: Any = tags.get("phase", "begun")
        outcome: Any = tags.get("outcome") or None
        return LedgerEntry(
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
            look=tags.get("look", ""),
            outcome=outcome,
            reason=tags.get("reason", ""),
            ended=_time(run.info.end_time) if run.info.end_time else None,
        )


def history_lines(entries: Sequence[LedgerEntry]) -> list[str]:
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


def history_json(entries: Sequence[LedgerEntry]) -> str:
    """Return the history as JSON."""
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
                "look": entry.look,
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
    """Return user and host of this process; in a pod the host is the pod's name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "promoter"
    return f"{user}@{socket.gethostname()}"


def _time(milliseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, tz=datetime.UTC)
