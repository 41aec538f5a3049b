"""Promotion locks: a renewed Kubernetes Lease, and a file lock released when the process ends."""

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
from training.promotion.target import Report

LEASE: Final = "milonga-promote"
"""Name of the Lease."""
LEASE_SECONDS: Final = 30.0
"""Time without renewal after which a holder counts as dead."""
RENEWALS: Final = 3
"""Renewals within `LEASE_SECONDS`."""
TRUSTED: Final = 2 / 3
"""Part of `LEASE_SECONDS` for which a holder trusts its last renewal; others wait for all of it."""
FRESH: Final = 0.1
"""Part of `LEASE_SECONDS` for which a renewal is fresh: a change needs no new one."""
_RETRY: Final = 1 / 30
"""Part of `LEASE_SECONDS` between two attempts to renew."""
POLL_SECONDS: Final = 1.0


class Leases(Protocol):
    """The API calls of a lock. They raise `ServiceUnavailableError` or `ConflictError`."""

    def read_lease(self, name: str) -> Json | None:
        """Return a Lease; None if there is none."""

    def create_lease(self, name: str, spec: Json) -> Json:
        """Create a Lease; return it."""

    def replace_lease(self, lease: Json) -> Json:
        """Replace a Lease, if it was not changed since it was read; return it."""


class LeaseLock:
    """Holds a Lease, and renews it on a thread. `since`: time before the request that acquired it."""

    def __init__(self, leases: Leases, lease: Json, identity: str, seconds: float, since: float) -> None:
        self._leases, self._lease, self._identity, self._seconds = leases, lease, identity, seconds
        self._renewed = since
        self._taken_by = ""
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_periodically, name="promotion-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Renew the Lease unless it is fresh. Raise `BusyError` if somebody else may hold it.

        Retries for up to `LEASE_SECONDS` where the API server does not answer: a late renewal succeeds only
        if nobody else has taken the Lease, which would have changed it.
        """
        end = _now() + self._seconds
        while not self._renew():
            if self._taken_by:
                raise BusyError(
                    f"the Lease {LEASE} was taken over by {self._taken_by}; see `milonga promote history`"
                )
            if _now() > end:
                raise self._expired()
            time.sleep(self._seconds * _RETRY)

    def left(self) -> float:
        """Return for how many seconds the Lease is certainly held. Raises `BusyError` if it is not."""
        left = self._seconds * TRUSTED - (_now() - self._renewed)
        if self._taken_by or left <= 0:
            raise self._expired()
        return left

    def release(self) -> None:
        """Stop renewing, and release the Lease."""
        self._stop.set()
        self._thread.join()
        if not self._taken_by:
            with contextlib.suppress(MilongaError):  # it expires by itself
                self._leases.replace_lease(_held(self._lease, "", self._seconds))

    def _renew_periodically(self) -> None:
        wait = self._seconds / RENEWALS
        while not self._stop.wait(wait) and not self._taken_by:
            wait = self._seconds * (1 / RENEWALS if self._renew() else _RETRY)

    def _renew(self) -> bool:
        """Renew the Lease unless it is fresh; return whether it is certainly held."""
        with self._mutex:
            if self._taken_by:
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
                        self._lease = found  # an own renewal, whose answer was lost
                    else:
                        self._taken_by = "nobody" if found is None else holder_of(found) or "nobody"
            except MilongaError:
                pass  # the caller tries again
            else:
                self._renewed = begun  # the server renewed it then or later
                return True
            return False

    def _expired(self) -> BusyError:
        return BusyError(
            f"the Lease {LEASE} could not be renewed for {_now() - self._renewed:.0f} s, so somebody else "
            "may hold it; see `milonga promote history`, then `milonga promote resume`"
        )


@contextlib.contextmanager
def lease_lock(
    leases: Leases,
    report: Report,
    *,
    seconds: float = LEASE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[LeaseLock]:
    """Hold the Lease inside the context.

    An earlier holder counts as alive if it renews the Lease within the duration of the Lease, while this
    function watches. Clocks of two machines are never compared: one may be an hour off.

    Raises `BusyError` if a live holder has the Lease, `ServiceUnavailableError` as the calls do.
    """
    identity = f"{whoami()} {secrets.token_hex(4)}"
    lease = leases.read_lease(LEASE)
    if lease is not None and (holder := holder_of(lease)):
        lasts = float(lease["spec"].get("leaseDurationSeconds") or seconds)
        report(
            f"the Lease {LEASE} is held by {holder}: waiting up to {lasts:.0f} s to see whether it is alive"
        )
        lease = _wait_for_holder(leases, lease, lasts, sleep)
    since = _now()
    try:
        if lease is None:
            held = leases.create_lease(LEASE, _held({}, identity, seconds)["spec"])
        else:
            held = leases.replace_lease(_held(lease, identity, seconds))
    except ConflictError as error:
        raise BusyError("another promotion started at this moment; wait until it ends") from error
    lock = LeaseLock(leases, held, identity, seconds, since)
    try:
        yield lock
    finally:
        # Everything is done and reported; the Lease expires by itself.
        with contextlib.suppress(KeyboardInterrupt):
            lock.release()


def _wait_for_holder(
    leases: Leases, lease: Json, lasts: float, sleep: Callable[[float], None]
) -> Json | None:
    """Return the Lease once its holder has released it, or has not renewed it for `lasts` s."""
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
    """Return seconds on a clock that also counts while the machine sleeps, where the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def holder_of(lease: Json) -> str:
    """Return the holder of a Lease; an empty text without one."""
    return str((lease.get("spec") or {}).get("holderIdentity") or "")


def _held(lease: Json, identity: str, seconds: float) -> Json:
    """Return `lease` renewed by `identity`; released where that is empty."""
    spec = dict(lease.get("spec") or {})
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if identity and spec.get("holderIdentity") != identity:
        spec |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
    spec |= {
        "holderIdentity": identity,
        "renewTime": now,
        # For administrators; the API takes whole seconds, at least one.
        "leaseDurationSeconds": max(1, round(seconds)),
    }
    return {**lease, "spec": spec}


class FileLock:
    """A lock that the operating system releases when the process ends."""

    def check(self) -> None:
        """Do nothing: a file lock can't be lost."""


@contextlib.contextmanager
def file_lock(place: str) -> Iterator[FileLock]:
    """Hold the file lock of `place`. Raises `BusyError` if another process of this machine holds it."""
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
