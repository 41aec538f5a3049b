"""Promotion: candidate ▸ challenger ▸ gates ▸ rollout ▸ verification ▸ alias; or a rollback.

    milonga promote run --model milonga-tango --version 7
    milonga promote rollback | resume | history | bootstrap URI

Each phase is recorded in the ledger before it starts, and every step is idempotent, so that `resume` knows
what a promoter that died leaves to complete or to undo. After any other failure everything is restored at
once: pin and pods, challenger and alias; and the ledger records the reason.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from services.errors import InvalidInputError, MilongaError, invalid
from services.weights.registry import RegisteredVersion
from services.weights.uri import ResolvedModel
from training.exits import one_line
from training.promotion.errors import (
    BusyError,
    ForeignPinError,
    GatesRefusedError,
    RollbackError,
    UnrecordedError,
    exit_code,
)
from training.promotion.gates.examination import Examination, ScorerServices
from training.promotion.gates.gates import GatesConfig
from training.promotion.gates.human import RatingsSource, check_source, decide_by_people, ledger_row
from training.promotion.ledger import EVIDENCE, GATES, LATE, OUTCOMES, Kind, Ledger, LedgerEntry, Outcome
from training.promotion.registry import Registry
from training.promotion.target import Lock, Pin, Report, Target, pinned_digest, shown_pin, version_of
from training.tracking.register import register

RESTORE_SECONDS = 600.0
"""Minimum time for the former version to be served again, even where the deadline is shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Promoter:
    """Target, registry, ledger and settings of a promotion."""

    target: Target
    registry: Registry
    ledger: Ledger
    report: Report
    """Prints a line of progress."""
    alias: str = "champion"
    """Alias of the version that is served."""
    deadline: float = 600.0
    """Seconds that challenger and rollout may each take."""


def promote(
    promoter: Promoter,
    gates: GatesConfig,
    *,
    model: str,
    version: str | None = None,
    candidate_alias: str = "challenger",
    services: ScorerServices | None = None,
    ratings: RatingsSource | None = None,
) -> str:
    """Promote a version if it passes the gates; return the result as a line.

    Args:
        promoter: target, registry and ledger.
        gates: what the version must pass.
        model: name of the registered model.
        version: version to promote; None: the one that `candidate_alias` points to.
        candidate_alias: alias of candidates.
        services: services that compute scores and rewards; None: models in this process.
        ratings: the database of the gate of people's ratings, if there is one.

    Raises:
        InvalidInputError, ModelError: the version can't be promoted; nothing was changed.
        BusyError: another promotion runs, or was left unfinished: nothing was changed. Or the lock was
            lost midway: then nothing is undone, since another promoter may hold it.
        GatesRefusedError: the version is not good enough; the service is as before.
        RolloutError: challenger or rollout failed; all is rolled back.
        ServiceUnavailableError: target or registry can't be reached; all is rolled back.
        RollbackError: it failed, and a change could not be undone.
        UnrecordedError: the version is promoted, but the ledger does not record it.
    """
    start = time.monotonic()
    target, registry, report = promoter.target, promoter.registry, promoter.report
    place = target.place
    check_source(gates.human_gates, ratings)
    with target.lock() as lock:
        promoter.ledger.refuse_unfinished(place)
        champion = served_version(promoter, model)
        candidate = candidate_version(registry, model, version, candidate_alias)
        if candidate.digest == champion.digest:
            return f"{candidate} is served already; nothing to do"
        registry.check_architecture(champion, candidate)
        target.check_setup(challenger=True)
        target.check_reach()
        examination = Examination(gates, services)
        entry = begin("promotion", champion.uri, candidate, promoter, place)
        report(f"promotion of {candidate}, in place of version {champion.version}; run {entry.run_id}")
        with rollback_on_failure(entry, promoter, lock):
            entry.attach(GATES, gates.text)
            entry.enter("gates")
            # First, since that takes no clips.
            verdicts, people = decide_by_people(gates.human_gates, ratings, champion, candidate)
            evidence: dict[str, Any] = ledger_row(people, verdicts)
            if all(verdict.passed for verdict in verdicts):
                by_clips, found = examination.examine(
                    *(champion, candidate, target, promoter.deadline, report),
                    check=lock.check,
                    record=entry.look_at,
                )
                evidence = found | {"gates": [*evidence["gates"], *found["gates"]], "ratings": people}
                verdicts += by_clips
            entry.attach(EVIDENCE, json.dumps(evidence, indent=1, allow_nan=False))
            for verdict in verdicts:
                report(f"{'passed ' if verdict.passed else 'REFUSED'} {verdict}")
            refused = [str(verdict) for verdict in verdicts if not verdict.passed]
            if refused:
                raise GatesRefusedError(f"{candidate} is not promoted: {'; '.join(refused)}")
            lock.check()
            # Before the rollout: the new pod may need the challenger's device.
            target.stop_challenger()
            if version is None:
                _check_alias(registry, model, candidate_alias, candidate.version)
            roll_out(entry, candidate, promoter, lock)
    return f"{candidate} is promoted, in {time.monotonic() - start:.0f} s"


def roll_back(promoter: Promoter) -> str:
    """Serve again what was served before, without gates; return the result. Raises as `promote`."""
    start = time.monotonic()
    place = promoter.target.place
    with promoter.target.lock() as lock:
        promoter.ledger.refuse_unfinished(place)
        pin = current_pin(promoter.target)
        previous = promoter.ledger.before(place, pin)
        if previous is None:
            raise invalid(
                "rollback",
                f"the ledger records nothing that was served here before {shown_pin(pin)}; promote the "
                "version that you want instead",
            )
        version = promoter.registry.version_of_pin(previous)
        _check_alias(promoter.registry, version.name, promoter.alias, version_of(pin))
        promoter.target.check_setup(challenger=False)
        promoter.target.check_reach()
        entry = begin("rollback", pin, version, promoter, place)
        promoter.report(f"rollback from {shown_pin(pin)} to {version}; run {entry.run_id}")
        with rollback_on_failure(entry, promoter, lock):
            roll_out(entry, version, promoter, lock)
    return f"{version} is served again, after {time.monotonic() - start:.0f} s"


def bootstrap(
    promoter: Promoter, source: RegisteredVersion | ResolvedModel, model: str = "milonga-tango"
) -> str:
    """Pin the first version of a target, without gates; return the result.

    Args:
        promoter: target, registry and ledger.
        source: a version; or a model folder, registered as a version of `model` after all checks.
        model: name of the registered model.

    Raises `InvalidInputError` if another version is pinned or has the alias, else as `promote`.
    """
    start = time.monotonic()
    target, registry = promoter.target, promoter.registry
    place = target.place
    with target.lock() as lock:
        promoter.ledger.refuse_unfinished(place)
        pin = target.current_pin()
        name = source.name if isinstance(source, RegisteredVersion) else model
        served = registry.alias(name, promoter.alias)
        if pin is not None and pin.startswith("models:"):
            pinned = registry.version_of_pin(pin)
            if isinstance(source, ResolvedModel) and (pinned.name, pinned.digest) == (name, source.digest):
                source = pinned
            if source != pinned:
                raise _is_pinned(source, name, pinned)
            if served == pinned.version:
                return f"{pinned} is pinned already; nothing to do"
        if served is not None and registry.version(name, served).digest != source.digest:
            raise invalid(
                "bootstrap",
                f"is {_shown(source)}, and {name}@{promoter.alias} points to version {served}, which is "
                f"or was served elsewhere; give models:/{name}/{served}, or another --alias, or move the "
                "alias in MLflow",
            )
        target.check_setup(challenger=False)
        target.check_reach()
        if isinstance(source, ResolvedModel):
            source, _ = register(source, name, alias=None, uri=registry.uri)
        entry = begin("bootstrap", pin, source, promoter, place)
        with rollback_on_failure(entry, promoter, lock):
            roll_out(entry, source, promoter, lock)
    return f"{source} is pinned and served, after {time.monotonic() - start:.0f} s"


def resume(promoter: Promoter) -> str:
    """Complete the promotion of a promoter that died, or undo it if the pin was not set; return the result.

    Raises `InvalidInputError` if nothing is unfinished, `BusyError` if the promoter lives, else as
    `promote`.
    """
    target = promoter.target
    place = target.place
    with target.lock() as lock:
        entry = promoter.ledger.unfinished(place)
        if entry is None:
            raise invalid("resume", "nothing is unfinished here; see `milonga promote history`")
        title = _title(entry)
        pin = target.current_pin()
        if pin not in (entry.from_pin, entry.to_pin):
            lock.check()
            target.stop_challenger()
            entry.close("failed", f"while it was unfinished, somebody else pinned {shown_pin(pin)}")
            raise _foreign(entry, pin)
        target.check_reach()
        promoter.report(f"{title} was left in the phase {entry.phase}")
        # The pin counts as well: the ledger may have been unreachable when everything was restored.
        if entry.phase in LATE and pin == entry.to_pin:
            with rollback_on_failure(entry, promoter, lock):
                lock.check()
                target.stop_challenger()
                roll_out(entry, promoter.registry.version_of_pin(pin), promoter, lock)
            return f"{title} is completed"
        lock.check()
        undo(entry, promoter, lock, "failed", entry.reason or f"its promoter died in the phase {entry.phase}")
    return f"{title} is undone: {shown_pin(entry.from_pin)} is served"


def roll_out(entry: LedgerEntry, version: RegisteredVersion, promoter: Promoter, lock: Lock) -> None:
    """Set the pin of `version`, wait, verify, move the alias, and close the entry. Idempotent."""
    target, registry = promoter.target, promoter.registry
    entry.enter("rollout")
    _check_alias(registry, entry.model, entry.alias, entry.alias_before, version.version)
    pin = target.current_pin()
    if pin not in (entry.from_pin, entry.to_pin):
        raise _foreign(entry, pin)
    start = time.monotonic()
    lock.check()
    target.set_pin(entry.to_pin, promoter.deadline)
    target.wait(entry.to_pin, promoter.deadline)
    promoter.report(f"rolled out in {time.monotonic() - start:.1f} s")
    entry.enter("verification")
    target.verify(version.digest)
    promoter.report(f"verified: every answer is of {version.digest}")
    entry.enter("alias")
    _check_alias(registry, entry.model, entry.alias, entry.alias_before, version.version)
    lock.check()
    registry.set_alias(entry.model, entry.alias, version.version)
    outcome = entry.outcome = OUTCOMES[entry.kind]  # from here on there is nothing to undo
    try:
        promoter.report(f"{entry.model}@{entry.alias} is version {version.version}")
        _tag(entry, promoter)
        entry.close(outcome)
    except BaseException as error:
        raise UnrecordedError(
            f"{version} is {outcome} and served, but not recorded in the ledger ({one_line(error)}); "
            "`milonga promote resume` records it"
        ) from error


@contextlib.contextmanager
def rollback_on_failure(entry: LedgerEntry, promoter: Promoter, lock: Lock) -> Iterator[None]:
    """Undo the promotion if an error is raised inside, record the reason, and raise the error again."""
    try:
        yield
    except BaseException as error:
        if entry.outcome is not None:
            raise  # all is done but the record
        try:
            lock.check()
        except BusyError as lost:
            # Another promoter may hold the lock by now; its changes must not be undone.
            raise lost from error
        reason = one_line(error)
        promoter.report(f"failed, rolling back: {reason}")
        undo(entry, promoter, lock, _outcome(error), reason)
        raise


def undo(entry: LedgerEntry, promoter: Promoter, lock: Lock, outcome: Outcome, reason: str) -> None:
    """Restore the state before `entry`, and close the entry.

    Raises `RollbackError` if that fails, `BusyError` if the lock was lost meanwhile.
    """
    try:
        restore(entry, promoter, lock, reason)
    except BusyError:
        raise
    except ForeignPinError:
        with _warning_on_failure(promoter):
            entry.close(outcome, reason)
        raise
    except BaseException as error:
        raise RollbackError(
            f"{shown_pin(entry.from_pin)} could not be restored: {one_line(error)}; fix that, then `milonga "
            f"promote resume`. The rollback was needed because: {reason}"
        ) from error
    with _warning_on_failure(promoter):
        entry.close(outcome, reason)
        _tag(entry, promoter)


def restore(entry: LedgerEntry, promoter: Promoter, lock: Lock, reason: str = "") -> None:
    """Restore pin, challenger and alias as before `entry`. Raises where that fails.

    Quick steps come first: pods take their time to become ready, and may need the challenger's device.
    """
    target, registry = promoter.target, promoter.registry
    seconds = max(promoter.deadline, RESTORE_SECONDS)
    pinned, aliased = entry.phase in (*LATE, "restoring"), entry.phase in ("alias", "restoring")
    with _warning_on_failure(promoter):  # the ledger may be what failed, and is not needed to restore
        entry.enter("restoring", reason)
    start = time.monotonic()
    pin = target.current_pin() if pinned else entry.from_pin
    foreign = pin not in (entry.from_pin, entry.to_pin)
    lock.check()
    if pinned and not foreign:
        target.set_pin(entry.from_pin, seconds)
        lock.check()
    target.stop_challenger()
    if foreign:
        raise _foreign(entry, pin)
    version = version_of(entry.to_pin)
    if (
        aliased
        and entry.alias_before != version
        and registry.alias(entry.model, entry.alias) == version  # moved by a call whose answer was lost
    ):
        lock.check()
        registry.set_alias(entry.model, entry.alias, entry.alias_before)
    if pinned and entry.from_pin is not None and not target.idle:
        target.wait(entry.from_pin, seconds)
        target.verify(pinned_digest(entry.from_pin))
        promoter.report(
            f"{shown_pin(entry.from_pin)} is served again, after {time.monotonic() - start:.1f} s"
        )


def current_pin(target: Target) -> Pin:
    """Return the pin of a registered version. Raises `InvalidInputError` if none is pinned."""
    pin = target.current_pin()
    if pin is None or not pin.startswith("models:"):
        what = "nothing is pinned" if pin is None else f"{shown_pin(pin)} is served, which is in no registry"
        raise invalid(
            target.place, f"{what}; register and pin a model: `milonga promote bootstrap URI_OR_FOLDER`"
        )
    return pin


def served_version(promoter: Promoter, model: str) -> RegisteredVersion:
    """Return the served version. Raises `InvalidInputError` if pin, alias and `model` disagree."""
    champion = promoter.registry.version_of_pin(current_pin(promoter.target))
    if champion.name != model:
        raise invalid("--model", f"is {model}, and {champion} is served; give --model {champion.name}")
    _check_alias(promoter.registry, model, promoter.alias, champion.version)
    return champion


def candidate_version(registry: Registry, model: str, version: str | None, alias: str) -> RegisteredVersion:
    """Return `version`, or the one that `alias` points to. Raises as `Registry.version`."""
    number = version or registry.alias(model, alias)
    if number is None:
        raise invalid("--version", f"is missing, and {model} has no alias {alias}; give --version")
    return registry.version(model, number)


def begin(
    kind: Kind, from_pin: Pin | None, version: RegisteredVersion, promoter: Promoter, place: str
) -> LedgerEntry:
    """Create the ledger's entry of a promotion."""
    return promoter.ledger.begin(
        kind,
        place=place,
        model=version.name,
        alias=promoter.alias,
        alias_before=promoter.registry.alias(version.name, promoter.alias),
        from_pin=from_pin,
        to_pin=version.uri,
    )


def _check_alias(registry: Registry, model: str, alias: str, *expected: str | None) -> None:
    """Raise `InvalidInputError` if an alias points to none of `expected`."""
    found = registry.alias(model, alias)
    if found not in expected:
        raise invalid(
            f"{model}@{alias}",
            f"points to {_version_text(found)}, expected {_version_text(expected[0])}: somebody else "
            "moved it, or it is of another target; give --alias, or correct the alias in MLflow",
        )


def _version_text(version: str | None) -> str:
    return f"version {version}" if version else "nothing"


def _is_pinned(
    source: RegisteredVersion | ResolvedModel, name: str, pinned: RegisteredVersion
) -> InvalidInputError:
    first, version = (
        ("", source.version) if isinstance(source, RegisteredVersion) else ("register it, then ", "N")
    )
    return invalid(
        "bootstrap",
        f"is {_shown(source)}, and {pinned} is pinned; {first}promote: milonga promote run "
        f"--model {name} --version {version}",
    )


def _shown(source: RegisteredVersion | ResolvedModel) -> str:
    return str(source if isinstance(source, RegisteredVersion) else source.folder)


def _title(entry: LedgerEntry) -> str:
    return f"the {entry.kind} {shown_pin(entry.from_pin)} ▸ {shown_pin(entry.to_pin)}"


def _foreign(entry: LedgerEntry, pin: Pin | None) -> ForeignPinError:
    return ForeignPinError(
        f"{_title(entry)} is not completed, since somebody else pinned {shown_pin(pin)}: it stays, and the "
        f"entry is closed; check that the alias {entry.alias} is what you want"
    )


def _outcome(error: BaseException) -> Outcome:
    if isinstance(error, GatesRefusedError):
        return "refused"
    return "interrupted" if exit_code(error) == 130 else "failed"


def _tag(entry: LedgerEntry, promoter: Promoter) -> None:
    """Tag the version with the outcome. A failure is only a warning."""
    with _warning_on_failure(promoter):
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        tags = {"": entry.outcome or "", "time": now, "run": entry.run_id, "reason": entry.reason}
        promoter.registry.tag(entry.model, version_of(entry.to_pin), tags)


@contextlib.contextmanager
def _warning_on_failure(promoter: Promoter) -> Iterator[None]:
    """Report a `MilongaError` raised inside as a warning, and continue."""
    try:
        yield
    except MilongaError as error:
        promoter.report(f"warning: {one_line(error)}")
