"""What a dead, broken or hung model does to its service: to the calls, to health and to the process."""

import signal

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.services.reward.serving import serving
from tests.services.runtime.fault_prompts import BREAK, ERROR, EXIT, HANG, LARGE, NAN
from tests.services.runtime.faulty import BLOCKED_FAILURE, BLOCKED_LOOP, BLOCKED_THREAD, ROOM, faulty
from tests.services.runtime.programs import error_of, program, request, score, watch_health
from tests.waiting import LIMIT, until

PROMPT = "a dog barks"
SERVING = health_pb2.HealthCheckResponse.SERVING
ENDED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""Statuses of calls that a failed or stopping service has."""
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(EXIT, "thread has ended"), (HANG, "not ended within 10 s"), (BREAK, "last 3 batches")],
)
def test_a_model_that_works_no_longer_ends_the_process_out_loud(fault: str, reason: str) -> None:
    # One pair a batch, so that calls wait behind the faulty one.
    settings = {"MILONGA_MAX_BATCH_RUN_SECONDS": "10", "MILONGA_MAX_BATCH_SECONDS": "1"}
    with program(**settings) as started, started.channel() as channel:
        health = watch_health(channel)
        assert score(channel, PROMPT).result(LIMIT).rewards
        calls = [score(channel, fault), *(score(channel, PROMPT, PROMPT) for _ in range(4))]
        errors = [error_of(call) for call in calls]
        assert (grpc.StatusCode.UNAVAILABLE, True) in {(code, reason in text) for code, text in errors}
        assert all("mini" not in text for _, text in errors)
        if fault is not BREAK:
            # Those that arrive late are reset; those that overtook the faulty call were answered.
            assert errors[0][0] in ENDED
            assert {code for code, _ in errors} <= {*ENDED, grpc.StatusCode.OK}
        until(lambda: health.statuses == [SERVING, NOT_SERVING])
        code, lines = started.wait()
    assert code == 1
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert reason in lines[-1]
    assert '"level": "critical"' in "".join(lines)


def test_a_hung_call_does_not_keep_the_process_from_stopping() -> None:
    settings = {"MILONGA_MAX_BATCH_RUN_SECONDS": "0", "MILONGA_GRACE_SECONDS": "0.5"}
    with program(**settings) as started, started.channel() as channel:
        health = watch_health(channel)
        call = score(channel, HANG)
        waiting = score(channel, PROMPT)
        until(lambda: call.running() or call.done())
        started.process.send_signal(signal.SIGTERM)
        until(lambda: health.statuses == [SERVING, NOT_SERVING])
        assert error_of(call)[0] in ENDED
        assert error_of(waiting)[0] in (*ENDED, grpc.StatusCode.OK)
        started.wait()


def test_a_failure_while_the_event_loop_is_blocked_ends_the_process() -> None:
    with program(BLOCKED_FAILURE) as started:
        code, lines = started.wait()
    assert code == 1
    assert any('"reason": "a test"' in line for line in lines)
    assert any("call_later" in line or "events.py" in line for line in lines)  # where it is blocked


@pytest.mark.parametrize("fault", [BLOCKED_LOOP, BLOCKED_THREAD])
def test_what_can_not_be_closed_is_ended_and_shown(fault: str) -> None:
    with program(fault) as started, started.channel() as channel:
        assert score(channel, PROMPT).result(LIMIT).rewards
        started.process.send_signal(signal.SIGTERM)
        code, lines = started.wait()
    assert code == 1
    assert any("faulty.py" in line for line in lines)  # where it hangs


def test_a_failure_while_draining_ends_the_drain() -> None:
    with program(MILONGA_DRAIN_DELAY_SECONDS="3600") as started, started.channel() as channel:
        assert score(channel, PROMPT).result(LIMIT).rewards
        health = watch_health(channel)
        started.process.send_signal(signal.SIGTERM)
        until(lambda: health.statuses == [SERVING, NOT_SERVING])
        assert error_of(score(channel, EXIT))[0] is grpc.StatusCode.UNAVAILABLE
        assert started.wait()[0] == 1


def test_faulty_calls_in_a_row_do_not_end_a_model_that_works() -> None:
    with serving(faulty(), max_batch_seconds=1.0) as served:
        assert served.stub.BatchComputeRewards(request(PROMPT)).rewards
        for _ in range(7):
            code, text = error_of(served.stub.BatchComputeRewards.future(request(ERROR)))
            assert code is grpc.StatusCode.INTERNAL
            assert "CUDA" not in text
        assert served.stub.BatchComputeRewards(request(PROMPT)).rewards


def test_only_the_offender_of_a_batch_fails() -> None:
    faults = {
        ERROR: (grpc.StatusCode.INTERNAL, "internal error"),
        LARGE: (grpc.StatusCode.RESOURCE_EXHAUSTED, "item 1 of the call needs more memory"),
        NAN: (grpc.StatusCode.INTERNAL, "reward of clip 1 is NaN or infinite"),
    }
    # Long enough for all to share a batch, which is larger than the memory.
    with serving(faulty(), max_wait_seconds=1.0) as served:
        fine = [served.stub.BatchComputeRewards.future(request(*[PROMPT] * n)) for n in (1, ROOM, 2 * ROOM)]
        bad = {fault: served.stub.BatchComputeRewards.future(request(PROMPT, fault)) for fault in faults}
        for fault, (code, text) in faults.items():
            found, details = error_of(bad[fault])
            assert found is code
            assert text in details
        rewards = [reward.logit for call in fine for reward in call.result(LIMIT).rewards]
        assert len(rewards) == 1 + 3 * ROOM
        assert rewards == pytest.approx([rewards[0]] * len(rewards), rel=1e-3)
