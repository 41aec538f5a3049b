"""Locks that outlive nobody: a Lease that its holder renews, and a file lock that dies with its process."""

import contextlib
import datetime
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from services.errors import MilongaError, OutputError
from services.weights.registry import cache_folder
from training.cluster.namespace import ConflictError, Json
from training.promotion.errors import BusyError
from training.promotion.ledger import whoami
from training.promotion.target import Tell

LEASE: Final = "milonga-promote"
"""Name of the Lease."""
LEASE_SECONDS: Final = 30.0
"""Time after which a holder that renews no more is given up."""
RENEWALS: Final = 3
"""Renewals in that time."""
TRUSTED: Final = 2 / 3
"""Part of that time in which a holder goes by its last renewal: others need all of it to give it up."""
FRESH: Final = 0.1
"""Part of that time after which it renews before it changes something."""
_AGAIN: Final = 1 / 30
POLL_SECONDS: Final = 1.0


class Leases(Protocol):
    """The calls of the API that a lock makes. They raise `ServiceUnavailableError`, or `ConflictError`."""

    def read_lease(self, name: str) -> Json | None:
        """The Lease; None where there is none."""

    def create_lease(self, name: str, spec: Json) -> Json:
        """Make it."""

    def replace_lease(self, lease: Json) -> Json:
        """Change it, if nobody has since it was read."""


class LeaseLock:
    """Holds a Lease, and renews it on a thread. `since`: when it was asked for."""

    def __init__(self, leases: Leases, lease: Json, identity: str, seconds: float, since: float) -> None:
        self._leases, self._lease, self._identity, self._seconds = leases, lease, identity, seconds
        self._renewed = since
        self._taken = ""
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="promotion-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `BusyError` where somebody else may hold it. If it was not renewed just now, that is done.

        An API server that does not answer is asked for as long as a Lease lasts: one that is renewed late
        was held by nobody else, or it would have changed.
        """
        end = _now() + self._seconds
        while not self._renew():
            if self._taken:
                raise BusyError(
                    f"the Lease {LEASE} was taken over by {self._taken}; see `milonga promote history`"
                )
            if _now() > end:
                raise self._silent()
            time.sleep(self._seconds * _AGAIN)

    def left(self) -> float:
        """Seconds that it is held for certain. Raises `BusyError` where there are none."""
        left = self._seconds * TRUSTED - (_now() - self._renewed)
        if self._taken or left <= 0:
            raise self._silent()
        return left

    def release(self) -> None:
        """Let go of it."""
        self._stop.set()
        self._thread.join()
        if not self._taken:
            with contextlib.suppress(MilongaError):  # it runs out by itself
                self._leases.replace_lease(_held(self._lease, "", self._seconds))

    def _keep(self) -> None:
        wait = self._seconds / RENEWALS
        while not self._stop.wait(wait) and not self._taken:
            wait = self._seconds * (1 / RENEWALS if self._renew() else _AGAIN)

    def _renew(self) -> bool:
        """Renew it once, if that is not fresh; whether it is held for certain."""
        with self._turn:
            if self._taken:
                return False
            begun = _now()
            if begun - self._renewed <= self._seconds * FRESH:
                return True
            try:
                self._lease = self._leases.replace_lease(_held(self._lease, self._identity, self._seconds))
            except ConflictError:
                with contextlib.suppress(MilongaError):
                    found = self._leases.read_lease(LEASE)
                    if found is not None and holder_of(found) == self._identity:
                        self._lease = found  # our own change, whose answer got lost
                    else:
                        self._taken = "nobody" if found is None else holder_of(found) or "nobody"
            except MilongaError:
                pass  # tried again
            else:
                self._renewed = begun  # it may have counted from then on
                return True
            return False

    def _silent(self) -> BusyError:
        return BusyError(
            f"the Lease {LEASE} could not be renewed for {_now() - self._renewed:.0f} s, so somebody else "
            "may hold it; see `milonga promote history`, then `milonga promote resume`"
        )


@contextlib.contextmanager
def lease_lock(
    leases: Leases,
    tell: Tell,
    *,
    seconds: float = LEASE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[LeaseLock]:
    """Hold the Lease for the time of the context.

    A holder is alive if it renews while we look on, for as long as a Lease lasts. No clocks are compared:
    the laptop's may be an hour off.

    Raises `BusyError` where somebody holds it, `ServiceUnavailableError` as the calls do.
    """
    identity = f"{whoami()} {secrets.token_hex(4)}"
    lease = leases.read_lease(LEASE)
    if lease is not None and (holder := holder_of(lease)):
        lasts = float(lease["spec"].get("leaseDurationSeconds") or seconds)
        tell(f"the Lease {LEASE} is held by {holder}: waiting up to {lasts:.0f} s to see whether it is alive")
        lease = _outlived(leases, lease, lasts, sleep)
    since = _now()
    try:
        if lease is None:
            held = leases.create_lease(LEASE, _held({}, identity, seconds)["spec"])
        else:
            held = leases.replace_lease(_held(lease, identity, seconds))
    except ConflictError as error:
        raise BusyError("another promotion began at this moment; wait for its end") from error
    lock = LeaseLock(leases, held, identity, seconds, since)
    try:
        yield lock
    finally:
        # What was done is done, and said; the Lease runs out by itself.
        with contextlib.suppress(KeyboardInterrupt):
            lock.release()


def _outlived(leases: Leases, lease: Json, lasts: float, sleep: Callable[[float], None]) -> Json | None:
    """The Lease, once its holder is known to be dead or to have let go of it."""
    holder, waited, first = holder_of(lease), 0.0, lease["spec"].get("renewTime")
    poll = min(POLL_SECONDS, lasts / 4)
    while waited < lasts:
        sleep(poll)
        waited += poll
        found = leases.read_lease(LEASE)
        if found is None or not holder_of(found):
            return found
        lease = found
        if holder_of(lease) != holder or lease["spec"].get("renewTime") != first:
            raise BusyError(f"another promotion runs: {holder_of(lease)} holds the Lease {LEASE}")
    return lease


def _now() -> float:
    """Seconds on a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def holder_of(lease: Json) -> str:
    """Who holds it; empty where nobody does."""
    return str((lease.get("spec") or {}).get("holderIdentity") or "")


def _held(lease: Json, identity: str, seconds: float) -> Json:
    """`lease` as `identity` holds it from now on; with an empty one, as nobody does."""
    spec = dict(lease.get("spec") or {})
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if identity and spec.get("holderIdentity") != identity:
        spec |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
    spec |= {
        "holderIdentity": identity,
        "renewTime": now,
        # What an administrator looks at; whole seconds, and at least one.
        "leaseDurationSeconds": max(1, round(seconds)),
    }
    return {**lease, "spec": spec}


class FileLock:
    """A lock that the system takes away with its process."""

    def check(self) -> None:
        """It can't be lost."""


@contextlib.contextmanager
def file_lock(place: str) -> Iterator[FileLock]:
    """Hold the file lock of `place`. Raises `BusyError` where another process on this machine does."""
    path = cache_folder() / "promotion" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', place)}.lock"
    with contextlib.ExitStack() as closing:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = closing.enter_context(path.open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"another promotion runs: {holder} holds {path}") from None
        except OSError as error:
            raise OutputError(
                f"{path} can't be locked: {error.strerror}; set MILONGA_CACHE elsewhere"
            ) from error
        file.truncate(0)
        file.write(f"{whoami()}, process {os.getpid()}")
        file.flush()
        yield FileLock()
