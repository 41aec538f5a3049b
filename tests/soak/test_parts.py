"""What a soak run is made of, without a run: the schedule, the ledger and the fit."""

import time
from dataclasses import replace

import numpy as np
import pytest

from tests.soak.growth import Growth, growth
from tests.soak.ledger import Window, explain
from tests.soak.load import STUCK, Call
from tests.soak.mix import Attempt, Mix
from tests.soak.processes import Line, Sample
from tests.soak.schedule import RESTARTING, RESTARTS_UNTIL, TOXIC, Fault, schedule

SERVICES = ("generation", "scoring", "reward", "captioning", "explanation")


def test_a_schedule_depends_on_its_seed_alone() -> None:
    events = schedule(7, 600.0, SERVICES, toxic=True)
    assert events == schedule(7, 600.0, SERVICES, toxic=True) != schedule(8, 600.0, SERVICES, toxic=True)
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert {event.service for event in events} == set(SERVICES)


def test_every_fault_comes_and_processes_end_in_the_first_part_only() -> None:
    events = schedule(1, 3600.0, SERVICES, toxic=True)
    assert {(event.fault, event.service) for event in events} == {(f, s) for f in Fault for s in SERVICES}
    assert all(event.at < 3600 * RESTARTS_UNTIL for event in events if event.fault in RESTARTING)


def test_without_a_proxy_there_are_no_faults_of_the_network() -> None:
    assert not {event.fault for event in schedule(1, 3600.0, SERVICES, toxic=False)}.intersection(TOXIC)


def test_calls_depend_on_the_seed_alone() -> None:
    for service in SERVICES:
        ours, theirs = Mix(3), Mix(3)
        assert [ours.draw(service) for _ in range(50)] == [theirs.draw(service) for _ in range(50)]


ATTEMPT = Attempt(service="reward", method="/milonga.v1.RewardService/RankAudio", payload=b"")


def _call(code: str, *, timeout: float | None = None, proxied: bool = False, left: bool = False) -> Call:
    attempt = replace(ATTEMPT, timeout=timeout, proxied=proxied)
    return Call(attempt=attempt, request_id="1", code=code, details="", start=100.0, end=102.0, left=left)


def _line(code: str, seconds: float = 1.0) -> Line:
    return Line(request_id="1", rpc="RankAudio", code=code, seconds=seconds)


@pytest.mark.parametrize(
    ("call", "line", "fault"),
    [
        (_call("OK"), _line("CANCELLED"), Fault.KILL),
        (_call("OK"), None, None),
        (_call("OK", timeout=9.0), _line("DEADLINE_EXCEEDED"), None),
        (_call("UNAVAILABLE"), None, None),
        (_call("UNAVAILABLE"), _line("OK"), None),
        (_call("UNAVAILABLE"), _line("OK"), Fault.DRAIN),
        (_call("INTERNAL"), _line("OK"), None),
        (_call("CANCELLED"), _line("OK"), None),
        (_call("DEADLINE_EXCEEDED", timeout=5.0), _line("OK", 1.0), None),
        (_call("DEADLINE_EXCEEDED", timeout=5.0), None, None),
        (_call(STUCK), _line("CANCELLED"), None),
    ],
)
def test_differences_without_a_reason_are_not_explained(
    call: Call, line: Line | None, fault: Fault | None
) -> None:
    assert explain(call, line, [] if fault is None else [fault]) is None


@pytest.mark.parametrize(
    ("call", "line", "fault", "explanation"),
    [
        (_call("UNAVAILABLE"), None, Fault.KILL, "during: kill"),
        (_call("UNAVAILABLE"), _line("OK"), Fault.KILL, "during: kill"),
        (_call("UNAVAILABLE"), _line("CANCELLED"), Fault.DRAIN, "during: drain"),
        (_call("CANCELLED", left=True), _line("OK"), None, "ended as its caller cancelled"),
        (_call("CANCELLED", left=True), None, None, "the caller cancelled before it arrived"),
        (_call("DEADLINE_EXCEEDED", timeout=5.0), _line("OK", 4.8), None, "ended as its deadline passed"),
        (
            replace(_call("DEADLINE_EXCEEDED"), attempt=replace(ATTEMPT, timeout=5.0, pause=9.0)),
            _line("OK"),
            None,
            "the answer was sent, and not read by its deadline",
        ),
        (_call("PERMISSION_DENIED"), None, None, "refused, not logged"),
        (_call("OK", timeout=2.0), _line("DEADLINE_EXCEEDED"), None, "answered as its deadline passed"),
    ],
)
def test_differences_with_a_reason(
    call: Call, line: Line | None, fault: Fault | None, explanation: str
) -> None:
    assert explain(call, line, [] if fault is None else [fault]) == explanation


def test_a_fault_of_the_network_explains_only_calls_through_the_proxy() -> None:
    window = Window(fault=Fault.RESET, service="reward", start=101.0, end=103.0)
    assert window.explains(_call("UNAVAILABLE", proxied=True))
    assert not window.explains(_call("UNAVAILABLE"))
    assert not Window(fault=Fault.KILL, service="reward", start=90.0, end=95.0).explains(_call("OK"))


def _samples(mib_per_hour: float, *, threads: int = 20) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            at=float(at),
            rss=int((600 + mib_per_hour * at / 3600 + rng.normal(0, 2)) * 2**20),
            threads=20 if at < 1800 else threads,
            descriptors=40,
        )
        for at in range(2400)
    ]


def test_noise_is_no_growth_and_growth_is_found() -> None:
    found = growth(_samples(0.0), 0.0)
    assert found is not None
    assert not found.faults
    found = growth(_samples(120.0), 0.0)
    assert found is not None
    assert found.slope == pytest.approx(120.0, abs=15.0)
    assert "memory grows" in found.faults[0]
    short = growth(_samples(120.0)[:900], 0.0)
    assert short is not None
    assert "memory grows" in short.faults[0]
    found = growth(_samples(0.0, threads=60), 0.0)
    assert isinstance(found, Growth)
    assert found.faults == ["threads grow from 20 to 60"]


def test_too_few_samples_say_nothing() -> None:
    assert growth(_samples(0.0)[:70], 0.0) is None
    assert growth([], time.monotonic()) is None
