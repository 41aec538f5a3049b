"""Token buckets, and the back-off for wrong tokens, on a clock of the test's."""

import threading
from dataclasses import dataclass

import pytest

from services.errors import QuotaExceededError
from services.runtime import guesses
from services.runtime.guesses import FIRST_WAIT_SECONDS, FREE, LONGEST_WAIT_SECONDS, Guesses
from services.runtime.quotas import Bucket, Quota, Usage


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_refills_evenly_up_to_a_minutes_units() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    assert [bucket.take(20) for _ in range(4)] == [0, 0, 0, 20]
    clock.now += 5
    assert bucket.take(20) == pytest.approx(15)  # nothing was taken by the refusal
    clock.now += 15
    assert bucket.take(20) == 0
    clock.now += 3600
    assert [bucket.take(30) for _ in range(3)] == [0, 0, pytest.approx(30)]


def test_a_charge_above_a_minutes_units_needs_a_full_bucket_and_leaves_a_debt() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    assert bucket.take(1) == 0
    assert bucket.take(300) == pytest.approx(1)
    clock.now += 1
    assert bucket.take(300) == 0
    assert bucket.take(1) == pytest.approx(241)
    clock.now += 241
    assert bucket.take(1) == 0


def test_threads_take_no_unit_twice() -> None:
    bucket = Bucket(1000, Clock())
    taken: list[float] = []

    def take() -> None:
        taken.extend(bucket.take(1) for _ in range(500))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken.count(0.0) == 1000


def test_an_account_without_a_quota_charges_nothing() -> None:
    account = Usage("free", Quota())
    for _ in range(1000):
        account.count_call()
        account.charge(1e9)


def test_an_account_charges_calls_and_work_separately() -> None:
    account = Usage("studio", Quota(calls_per_minute=1, work_per_minute=100))
    account.count_call()
    with pytest.raises(QuotaExceededError, match="'studio' has used up its quota of 1 calls"):
        account.count_call()
    account.charge(100)
    with pytest.raises(QuotaExceededError, match="100 work units a minute") as caught:
        account.charge(50)
    assert 29 < caught.value.retry_after <= 30


def test_wrong_tokens_wait_twice_as_long_each_time_up_to_a_limit() -> None:
    clock = Clock()
    tries = Guesses(clock)
    waits = []
    for _ in range(FREE + 12):
        tries.note_wrong("host")
        try:
            tries.check("host", "digest")
            waits.append(0.0)
        except QuotaExceededError as error:
            waits.append(error.retry_after)
            clock.now += error.retry_after
        tries.check("host", "digest")
        tries.check("another", "digest")
    assert waits[: FREE - 1] == [0.0] * (FREE - 1)
    assert waits[FREE - 1 : FREE + 2] == [FIRST_WAIT_SECONDS * 2**n for n in range(3)]
    assert waits[-1] == LONGEST_WAIT_SECONDS


def test_a_host_is_forgotten_after_an_hour_without_a_wrong_token() -> None:
    clock = Clock()
    tries = Guesses(clock)
    for _ in range(FREE):
        tries.note_wrong("host")
    clock.now += guesses.FORGET_SECONDS + 1
    tries.note_wrong("host")
    tries.check("host", "digest")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "MAX_HOSTS", 10)
    tries = Guesses(Clock())
    for number in range(1000):
        tries.note_wrong(f"host {number}")
        tries.note_right("host", f"digest {number}")
    assert len(tries) == 20
