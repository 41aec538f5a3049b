"""Locks exclude other promotions, until the holder dies."""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.errors import ServiceUnavailableError
from tests.waiting import until
from training.cluster.namespace import ConflictError, Json
from training.promotion.errors import BusyError
from training.promotion.targets import locks
from training.promotion.targets.locks import LEASE, LeaseLock, file_lock, holder_of, lease_lock

SECONDS = 1.0


class Leases:
    """The API's optimistic concurrency, in memory."""

    def __init__(self, spec: Json | None = None) -> None:
        self.lease: Json | None = (
            None if spec is None else {"metadata": {"name": LEASE, "v": 0}, "spec": spec}
        )
        self.away = False
        self.writes = 0
        self._lock = threading.Lock()

    def read_lease(self, name: str) -> Json | None:
        return copy.deepcopy(self.lease)

    def create_lease(self, name: str, spec: Json) -> Json:
        if self.lease is not None:
            raise ConflictError("exists")
        self.lease = {"metadata": {"name": name, "v": 0}, "spec": spec}
        return copy.deepcopy(self.lease)

    def replace_lease(self, lease: Json) -> Json:
        with self._lock:
            if self.away:
                raise ServiceUnavailableError("the cluster can't be reached")
            assert self.lease is not None
            if lease["metadata"]["v"] != self.lease["metadata"]["v"]:
                raise ConflictError("changed")
            self.writes += 1
            self.lease = {**copy.deepcopy(lease), "metadata": {"name": LEASE, "v": self.writes}}
            return copy.deepcopy(self.lease)


def is_lost(lock: LeaseLock) -> bool:
    """Whether it may be somebody else's."""
    try:
        return lock.left() <= 0
    except BusyError:
        return True


def ignore(line: str) -> None:
    pass


@pytest.mark.parametrize("spec", [None, {}, {"holderIdentity": "", "leaseTransitions": 3}])
def test_a_free_lease_is_held_renewed_and_released(spec: Json | None) -> None:
    leases = Leases(spec)

    def renewed() -> str:
        assert leases.lease is not None
        return str(leases.lease["spec"]["renewTime"])

    with lease_lock(leases, ignore, seconds=SECONDS) as lock:
        assert leases.lease is not None
        assert holder_of(leases.lease)
        first = renewed()
        assert leases.lease["spec"]["leaseTransitions"] == (4 if spec else 1)
        until(lambda: renewed() > first)
        lock.check()
    assert holder_of(leases.lease) == ""


def test_a_holder_that_renews_is_alive_whatever_its_clock_says() -> None:
    spec = {"holderIdentity": "ann", "renewTime": "1990-01-01", "leaseDurationSeconds": 2}
    leases = Leases(spec)

    def renew(seconds: float) -> None:
        assert leases.lease is not None
        leases.lease["spec"]["renewTime"] = "1990-01-02"

    reported: list[str] = []
    with pytest.raises(BusyError, match="ann holds the Lease milonga-promote"):  # noqa: SIM117
        with lease_lock(leases, reported.append, sleep=renew):
            pass
    assert "held by ann: waiting up to 2 s" in reported[0]


def test_a_holder_that_does_not_renew_is_replaced() -> None:
    leases = Leases({"holderIdentity": "ann", "renewTime": "2990-01-01", "leaseDurationSeconds": 2})
    waited: list[float] = []
    with lease_lock(leases, ignore, sleep=waited.append):
        assert leases.lease is not None
        assert "ann" not in holder_of(leases.lease)
    assert sum(waited) == pytest.approx(2)


def test_a_lease_that_is_released_meanwhile_is_taken_at_once() -> None:
    leases = Leases({"holderIdentity": "ann", "renewTime": "2990-01-01", "leaseDurationSeconds": 60})

    def let_go(seconds: float) -> None:
        assert leases.lease is not None
        leases.lease["spec"]["holderIdentity"] = ""

    with lease_lock(leases, ignore, sleep=let_go):
        pass


def test_of_two_simultaneous_promotions_one_is_refused() -> None:
    class Raced(Leases):
        def read_lease(self, name: str) -> Json | None:
            found = super().read_lease(name)
            self.replace_lease(copy.deepcopy(found))  # type: ignore[arg-type]
            return found

    with pytest.raises(BusyError, match="at this moment"):  # noqa: SIM117
        with lease_lock(Raced({}), ignore, seconds=SECONDS):
            pass


def test_a_lease_that_is_taken_or_cannot_be_renewed_is_lost() -> None:
    leases = Leases({})
    with lease_lock(leases, ignore, seconds=0.4) as lock:
        lock.check()
        assert leases.lease is not None
        leases.lease = {"metadata": {"name": LEASE, "v": 99}, "spec": {"holderIdentity": "ben"}}
        until(lambda: is_lost(lock))
        with pytest.raises(BusyError, match="taken over by ben"):
            lock.check()
    assert holder_of(leases.lease) == "ben"

    leases = Leases({})
    with lease_lock(leases, ignore, seconds=0.4) as lock:
        leases.away = True
        until(lambda: is_lost(lock))
        with pytest.raises(BusyError, match="could not be renewed"):
            lock.check()
        leases.away = False
        until(lambda: not is_lost(lock))
        lock.check()


def test_a_holder_trusts_itself_for_less_time_than_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(locks, "_now", lambda: now)

    class Slow(Leases):
        def replace_lease(self, lease: Json) -> Json:
            nonlocal now
            found = super().replace_lease(lease)
            now += 1.0  # the answer takes its time, the Lease counts from before
            return found

    leases = Slow({})
    with lease_lock(leases, ignore, seconds=30.0) as lock:
        assert lock.left() == pytest.approx(19.0)
        now += 2.5  # a machine that sleeps lets its thread renew nothing
        lock.check()
        assert lock.left() == pytest.approx(19.0)
        writes = leases.writes
        lock.check()
        assert leases.writes == writes, "it was renewed just now"
        now += 19.0
        with pytest.raises(BusyError, match="could not be renewed for 20 s"):
            lock.left()
        lock.check()
        assert lock.left() > 0


def test_a_check_waits_for_an_api_server_that_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(locks, "_now", lambda: now)

    class Back(Leases):
        refused = 0

        def replace_lease(self, lease: Json) -> Json:
            self.away = 1 <= self.refused < 3
            self.refused += self.away
            return super().replace_lease(lease)

    leases = Back({})
    with lease_lock(leases, ignore, seconds=2.0) as lock:
        leases.refused = 1
        now += 1.5
        lock.check()
        assert leases.refused == 3


def test_a_file_lock_excludes_and_is_released_with_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path))
    path = tmp_path / "promotion" / "local-127.0.0.1-1.lock"
    path.parent.mkdir()
    program = (
        f"import fcntl, time; file = open({str(path)!r}, 'a+'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(BusyError, match="another promotion runs"):  # noqa: SIM117
        with file_lock("local/127.0.0.1:1"):
            pass
    process.kill()
    process.wait()
    process.stdout.close()
    with file_lock("local/127.0.0.1:1") as lock:
        lock.check()
        with pytest.raises(BusyError, match=r"process \d+ holds"), file_lock("local/127.0.0.1:1"):
            pass
