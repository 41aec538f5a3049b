"""Promotion: candidate ▸ challenger ▸ gates ▸ rollout ▸ verification ▸ alias; or everything as it was.

    milonga promote run --model milonga-tango --version 7
    milonga promote rollback | resume | history | bootstrap URI

Every phase stands in the ledger before it is begun, and every step may be done twice. So whatever kills the
promoter, `resume` knows what to finish and what to undo. Whatever else fails is undone at once: the pin goes
back and the pods with it, the challenger stops, the alias is where it was, and the reason is in the ledger.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from services.errors import FieldViolation, InvalidInputError, MilongaError
from training.exits import one_line
from training.promotion.errors import (
    BusyError,
    ForeignPinError,
    GatesRefusedError,
    RollbackError,
    UnrecordedError,
    exit_code,
)
from training.promotion.gates.examination import Examination, Judges
from training.promotion.gates.gates import GatesConfig
from training.promotion.ledger import EVIDENCE, GATES, LATE, OUTCOMES, Entry, Kind, Ledger, Outcome
from training.promotion.registry import Registry, Version
from training.promotion.target import Lock, Pin, Target, Tell, digest_of, shown_pin, version_of
from training.tracking.register import checked_manifest, register

RESTORE_SECONDS = 600.0
"""Least time that what was served before gets to be served again: a short deadline is not meant for that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Who takes part in a promotion."""

    target: Target
    registry: Registry
    ledger: Ledger
    tell: Tell
    """Says what goes on."""
    alias: str = "champion"
    """That says what is served."""
    deadline: float = 600.0
    """Seconds that challenger and rollout may each take to be ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A version that is to be promoted."""

    model: str
    """Name of the registered model."""
    version: str | None = None
    """None: the one that `candidate_alias` points to."""
    candidate_alias: str = "challenger"


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """How it ended well."""

    line: str
    """For people."""
    entry: Entry | None = None
    """In the ledger; None where nothing was to be done."""


def promote(wanted: Wanted, gates: GatesConfig, parts: Parts, judges: Judges | None = None) -> Done:
    """Promote a version, if it passes the gates.

    Raises:
        InvalidInputError, ModelError: what is wanted can't be promoted; nothing was changed.
        BusyError: another promotion runs, or was left unfinished; nothing was changed.
        GatesRefusedError: it is not good enough; nothing else is served than before.
        RolloutError: it does not come up; all is as it was.
        ServiceUnavailableError: target or registry can't be reached; all is as it was.
        RollbackError: it failed, and what was changed could not be changed back.
        UnrecordedError: it is promoted, only the ledger does not say so.
    """
    start = time.monotonic()
    place = parts.target.place
    with parts.target.lock() as lock:
        parts.ledger.refuse_unfinished(place)
        champion = served_version(parts, wanted.model)
        candidate = candidate_version(wanted, parts.registry)
        if candidate.digest == champion.digest:
            return Done(line=f"{candidate} is served already; nothing to do")
        parts.registry.check_architecture(champion, candidate)
        parts.target.check_setup(challenger=True)
        parts.target.check_reach()
        examination = Examination(gates, judges)
        entry = begin("promotion", champion.pin, candidate, parts, place)
        parts.tell(f"promotion of {candidate}, in place of version {champion.version}; run {entry.run_id}")
        with undone(entry, parts, lock):
            entry.attach(GATES, gates.text)
            entry.enter("gates")
            verdicts, evidence = examination.examine(
                *(champion, candidate, parts.target, parts.deadline, parts.tell),
                check=lock.check,
            )
            entry.attach(EVIDENCE, json.dumps(evidence, indent=1, allow_nan=False))
            for verdict in verdicts:
                parts.tell(f"{'passed ' if verdict.passed else 'REFUSED'} {verdict}")
            refused = [str(verdict) for verdict in verdicts if not verdict.passed]
            if refused:
                raise GatesRefusedError(f"{candidate} is not promoted: {'; '.join(refused)}")
            lock.check()
            # Before the rollout, not after it: its device may be the one that the new pod needs.
            parts.target.stop_challenger()
            if wanted.version is None:
                _check_alias(parts.registry, candidate.name, wanted.candidate_alias, candidate.version)
            put_live(entry, parts, lock)
    return Done(line=f"{candidate} is promoted, in {time.monotonic() - start:.0f} s", entry=entry)


def roll_back(parts: Parts) -> Done:
    """Serve again what was served before; without gates, since it was served. Raises as `promote`."""
    start = time.monotonic()
    place = parts.target.place
    with parts.target.lock() as lock:
        parts.ledger.refuse_unfinished(place)
        pin = current_pin(parts.target)
        previous = parts.ledger.before(place, pin)
        if previous is None:
            raise InvalidInputError(
                FieldViolation(
                    "rollback",
                    f"the ledger knows nothing that was served here before {shown_pin(pin)}; promote the "
                    "version that you want instead",
                )
            )
        version = parts.registry.of_pin(previous)
        _check_alias(parts.registry, version.name, parts.alias, version_of(pin))
        parts.target.check_setup(challenger=False)
        parts.target.check_reach()
        entry = begin("rollback", pin, version, parts, place)
        parts.tell(f"rollback from {shown_pin(pin)} to {shown_pin(previous)}; run {entry.run_id}")
        with undone(entry, parts, lock):
            put_live(entry, parts, lock)
    return Done(line=f"{version} is served again, after {time.monotonic() - start:.0f} s", entry=entry)


def bootstrap(what: Version | Path, parts: Parts, model: str = "milonga-tango") -> Done:
    """Pin a target that was never pinned. There is no champion to compare with, and so no gates.

    Args:
        what: a version; or a model folder, registered as one of `model` when nothing stands against it.
        parts: who takes part.
        model: name of the registered model.

    Raises `InvalidInputError` where another version is pinned, or has the alias, and as `promote`.
    """
    start = time.monotonic()
    name = what.name if isinstance(what, Version) else model
    digest = what.digest if isinstance(what, Version) else checked_manifest(what).digest
    place = parts.target.place
    with parts.target.lock() as lock:
        parts.ledger.refuse_unfinished(place)
        pin, alias = parts.target.current_pin(), parts.registry.alias(name, parts.alias)
        if pin is not None and pin.startswith("models:"):
            pinned = parts.registry.of_pin(pin)
            if isinstance(what, Path) and (pinned.name, pinned.digest) == (name, digest):
                what = pinned
            if what != pinned:
                first, version = (
                    ("", what.version) if isinstance(what, Version) else ("register it, then ", "N")
                )
                raise InvalidInputError(
                    FieldViolation(
                        "bootstrap",
                        f"is {what}, and {shown_pin(pin)} is pinned; {first}promote: milonga promote run "
                        f"--model {name} --version {version}",
                    )
                )
            if alias == pinned.version:
                return Done(line=f"{pinned} is pinned already; nothing to do")
        if alias is not None and parts.registry.version(name, alias).digest != digest:
            raise InvalidInputError(
                FieldViolation(
                    "bootstrap",
                    f"is {what}, and {name}@{parts.alias} points to version {alias}: that is served "
                    f"elsewhere, or was; give models:/{name}/{alias}, or another --alias, or "
                    "move it in MLflow",
                )
            )
        parts.target.check_setup(challenger=False)
        parts.target.check_reach()
        if isinstance(what, Path):
            done = register(what, name, alias=None, uri=parts.registry.uri)
            what = Version(name=done.name, version=done.version, digest=done.digest)
        entry = begin("bootstrap", pin, what, parts, place)
        with undone(entry, parts, lock):
            put_live(entry, parts, lock)
    return Done(line=f"{what} is pinned and served, after {time.monotonic() - start:.0f} s", entry=entry)


def resume(parts: Parts) -> Done:
    """Finish what a promoter that died had rolled out, or undo what it had not come so far with.

    Raises `InvalidInputError` where nothing is unfinished, `BusyError` where it lives, and as `promote`.
    """
    place = parts.target.place
    with parts.target.lock() as lock:
        entry = parts.ledger.unfinished(place)
        if entry is None:
            raise InvalidInputError(
                FieldViolation("resume", "nothing was left unfinished here; see `milonga promote history`")
            )
        name = _title(entry)
        pin = parts.target.current_pin()
        if pin not in (entry.from_pin, entry.to_pin):
            lock.check()
            parts.target.stop_challenger()
            entry.close("failed", f"while it was unfinished, somebody else pinned {shown_pin(pin)}")
            raise _foreign(entry, pin)
        parts.target.check_reach()
        parts.tell(f"{name} was left in the phase {entry.phase}")
        # The pin tells more than the ledger, which may have been away when all was put back.
        if entry.phase in LATE and pin == entry.to_pin:
            with undone(entry, parts, lock):
                lock.check()
                parts.target.stop_challenger()
                put_live(entry, parts, lock)
            return Done(line=f"{name} is finished", entry=entry)
        lock.check()
        undo(entry, parts, lock, "failed", entry.reason or f"its promoter died in the phase {entry.phase}")
    return Done(line=f"{name} is undone: {shown_pin(entry.from_pin)} is served", entry=entry)


def put_live(entry: Entry, parts: Parts, lock: Lock) -> None:
    """From passed gates to the end. Every step may have been done before."""
    version = parts.registry.of_pin(entry.to_pin)
    entry.enter("rollout")
    _check_alias(parts.registry, entry.model, entry.alias, entry.alias_before, version.version)
    pin = parts.target.current_pin()
    if pin not in (entry.from_pin, entry.to_pin):
        raise _foreign(entry, pin)
    begun = time.monotonic()
    lock.check()
    parts.target.set_pin(entry.to_pin, parts.deadline)
    parts.target.wait(entry.to_pin, parts.deadline)
    parts.tell(f"rolled out in {time.monotonic() - begun:.1f} s")
    entry.enter("verification")
    parts.target.verify(version.digest)
    parts.tell(f"verified: everything that serves answers with {version.digest}")
    entry.enter("alias")
    _check_alias(parts.registry, entry.model, entry.alias, entry.alias_before, version.version)
    lock.check()
    parts.registry.point(entry.model, entry.alias, version.version)
    outcome = entry.outcome = OUTCOMES[entry.kind]  # from here on there is nothing to undo
    try:
        parts.tell(f"{entry.model}@{entry.alias} is version {version.version}")
        _tag(entry, parts)
        entry.close(outcome)
    except BaseException as error:
        raise UnrecordedError(
            f"{version} is {outcome} and served, only the ledger could not be told ({one_line(error)}); "
            "`milonga promote resume` does it"
        ) from error


@contextlib.contextmanager
def undone(entry: Entry, parts: Parts, lock: Lock) -> Iterator[None]:
    """Undo a promotion that fails inside, write down why, and raise it on."""
    try:
        yield
    except BaseException as error:
        if entry.outcome is not None:
            raise  # all is done but what the ledger says of it
        try:
            lock.check()
        except BusyError as lost:
            # Somebody else may be at work by now, and what they do is not ours to undo.
            raise lost from error
        reason = one_line(error)
        parts.tell(f"failed, all goes back to what it was: {reason}")
        undo(entry, parts, lock, _outcome(error), reason)
        raise


def undo(entry: Entry, parts: Parts, lock: Lock, outcome: Outcome, reason: str) -> None:
    """Restore what was before `entry`, and close it.

    Raises `RollbackError` where that can't be, `BusyError` where the lock was lost over it.
    """
    try:
        restore(entry, parts, lock, reason)
    except BusyError:
        raise
    except ForeignPinError:
        with _told(parts):
            entry.close(outcome, reason)
        raise
    except BaseException as error:
        raise RollbackError(
            f"{shown_pin(entry.from_pin)} could not be restored: {one_line(error)}; then "
            f"`milonga promote resume`. It was to be restored because: {reason}"
        ) from error
    with _told(parts):
        entry.close(outcome, reason)
        _tag(entry, parts)


def restore(entry: Entry, parts: Parts, lock: Lock, reason: str = "") -> None:
    """Everything as it was before `entry`. Raises where that can't be.

    What is quick goes first: that pods come up again may take its time, or need the challenger's device.
    """
    moved, aliased = entry.phase in (*LATE, "restoring"), entry.phase in ("alias", "restoring")
    with _told(parts):  # the ledger may be why it fails, and is not needed for this
        entry.enter("restoring", reason)
    begun = time.monotonic()
    pin = parts.target.current_pin() if moved else entry.from_pin
    foreign = pin not in (entry.from_pin, entry.to_pin)
    lock.check()
    if moved and not foreign:
        parts.target.set_pin(entry.from_pin, max(parts.deadline, RESTORE_SECONDS))
        lock.check()
    parts.target.stop_challenger()
    if foreign:
        raise _foreign(entry, pin)
    # Moved by a call of ours whose answer got lost, and by nobody else.
    if aliased and entry.alias_before != version_of(entry.to_pin) == parts.registry.alias(
        entry.model, entry.alias
    ):
        lock.check()
        parts.registry.point(entry.model, entry.alias, entry.alias_before)
    if moved and entry.from_pin is not None and not parts.target.idle:
        parts.target.wait(entry.from_pin, max(parts.deadline, RESTORE_SECONDS))
        parts.target.verify(digest_of(entry.from_pin))
        parts.tell(f"{shown_pin(entry.from_pin)} is served again, after {time.monotonic() - begun:.1f} s")


def _title(entry: Entry) -> str:
    return f"the {entry.kind} {shown_pin(entry.from_pin)} ▸ {shown_pin(entry.to_pin)}"


def _foreign(entry: Entry, pin: Pin | None) -> ForeignPinError:
    return ForeignPinError(
        f"{_title(entry)} did not come to its end, and meanwhile somebody else pinned {shown_pin(pin)}: it "
        f"stays, the entry is closed; check that the alias {entry.alias} is what you want"
    )


def current_pin(target: Target) -> Pin:
    """The pin. Raises `InvalidInputError` where there is none."""
    pin = target.current_pin()
    if pin is None or not pin.startswith("models:"):
        what = "nothing is pinned" if pin is None else f"{shown_pin(pin)} is served, which is of no registry"
        raise InvalidInputError(
            FieldViolation(
                target.place,
                f"{what}; `milonga promote bootstrap URI_OR_FOLDER` registers and pins something",
            )
        )
    return pin


def served_version(parts: Parts, model: str) -> Version:
    """What is served, which the alias must agree with. Raises as `Registry.of_pin`."""
    champion = parts.registry.of_pin(current_pin(parts.target))
    if champion.name != model:
        raise InvalidInputError(
            FieldViolation("--model", f"is {model}, and {champion} is served; give --model {champion.name}")
        )
    _check_alias(parts.registry, model, parts.alias, champion.version)
    return champion


def candidate_version(wanted: Wanted, registry: Registry) -> Version:
    """What is to be served. Raises as `Registry.version`, and `InvalidInputError` without any."""
    version = wanted.version or registry.alias(wanted.model, wanted.candidate_alias)
    if version is None:
        raise InvalidInputError(
            FieldViolation(
                "--version",
                f"is missing, and {wanted.model} has no alias {wanted.candidate_alias}; give --version",
            )
        )
    return registry.version(wanted.model, version)


def begin(kind: Kind, from_pin: Pin | None, to: Version, parts: Parts, place: str) -> Entry:
    """The entry of a promotion that begins."""
    return parts.ledger.begin(
        kind,
        place=place,
        model=to.name,
        alias=parts.alias,
        alias_before=parts.registry.alias(to.name, parts.alias),
        from_pin=from_pin,
        to_pin=to.pin,
    )


def _check_alias(registry: Registry, model: str, alias: str, *expected: str | None) -> None:
    """Raise `InvalidInputError` where an alias points to none of `expected`: somebody else moved it."""
    found = registry.alias(model, alias)
    if found not in expected:
        raise InvalidInputError(
            FieldViolation(
                f"{model}@{alias}",
                f"points to {_version_text(found)}, expected {_version_text(expected[0])}: somebody else "
                "moved it, or another --alias is meant; give that, or set it right in MLflow",
            )
        )


def _version_text(version: str | None) -> str:
    return f"version {version}" if version else "nothing"


def _outcome(error: BaseException) -> Outcome:
    if isinstance(error, GatesRefusedError):
        return "refused"
    return "interrupted" if exit_code(error) == 130 else "failed"


def _tag(entry: Entry, parts: Parts) -> None:
    """Tell on the version how its promotion ended. Not worth failing for."""
    with _told(parts):
        version = parts.registry.of_pin(entry.to_pin)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        tags = {"": entry.outcome or "", "time": now, "run": entry.run_id, "reason": entry.reason}
        parts.registry.tag(version, tags)


@contextlib.contextmanager
def _told(parts: Parts) -> Iterator[None]:
    """Say what fails inside, and go on."""
    try:
        yield
    except MilongaError as error:
        parts.tell(f"warning: {one_line(error)}")
