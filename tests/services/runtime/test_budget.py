"""The budget of bytes: how much is held, who may read, who is refused."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2 as inference

from milonga.v1 import audio_pb2
from milonga.v1 import reward_pb2 as pb
from services.errors import QueueFullError
from services.runtime.budget import Budget, Hold, current_hold
from services.runtime.callers import Caller, calling
from tests.services.inference.asking import inference_request, tensor
from tests.services.reward.serving import Served, float32, serving, tone
from tests.tiny import tiny_clap, tiny_reward
from tests.waiting import until

MIB = 2**20


def hold(budget: Budget, name: str) -> Hold:
    with calling(Caller(name=name)):
        return budget.hold()


def test_a_request_alone_is_admitted_and_others_are_refused_beyond_the_limit() -> None:
    budget = Budget(10, 4)
    alone, other = hold(budget, "a"), hold(budget, "b")
    alone.resize(12)
    with pytest.raises(QueueFullError, match="no room for") as caught:
        other.resize(1)
    assert caught.value.retry_after > 0
    assert (budget.held, caught.value.refusal) == (12, "memory")
    alone.resize(9)
    other.resize(1)
    alone.release()
    other.release()
    assert budget.held == 0


def test_a_caller_leaves_room_for_others() -> None:
    budget = Budget(100, 10)
    first, second = hold(budget, "greedy"), hold(budget, "greedy")
    first.resize(60)
    with pytest.raises(QueueFullError):
        second.resize(35)
    hold(budget, "modest").resize(35)


def test_the_parts_of_a_stream_end_with_it() -> None:
    budget = Budget(100, 10)
    with budget.holding() as stream:
        one, other = stream.part(), stream.part()
        one.resize(20)
        other.resize(30)
        assert current_hold() is other
        one.release()
        assert budget.held == 30
    assert budget.held == 0


async def test_messages_are_read_as_far_as_there_is_memory_and_one_always() -> None:
    budget = Budget(30, 10)
    reading: list[str] = []
    done = asyncio.Event()

    async def read(name: str) -> None:
        with calling(Caller(name=name)):
            async with budget.reading() as charge:
                reading.append(name)
                await done.wait()
                charge(10)

    tasks = [asyncio.create_task(read(name)) for name in ("a", "a", "a", "b", "c")]
    await asyncio.sleep(0.01)
    assert sorted(reading) == ["a", "a", "b"]  # no caller takes all three
    done.set()
    await asyncio.gather(*tasks)
    assert len(reading) == 5
    hold(budget, "x").resize(30)
    await read("d")


async def test_a_caller_that_gives_up_while_waiting_or_reading_makes_room() -> None:
    budget = Budget(10, 10)
    never = asyncio.Event()

    async def read() -> None:
        async with budget.reading():
            await never.wait()

    tasks = [asyncio.create_task(read()) for _ in range(5)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with budget.reading():
        pass


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(tiny_reward(tiny_clap()), max_held_bytes=MIB) as served:
        yield served


def ranking(seconds: float, clips: int) -> pb.RankAudioRequest:
    return pb.RankAudioRequest(prompt="a dog barks", clips=[float32(tone(seconds))] * clips)


def test_what_requests_hold_is_freed_at_their_end_however_they_end(served: Served) -> None:
    budget = served.server.budget
    for request in (ranking(1.0, 2), pb.RankAudioRequest(), ranking(0.01, 2)):
        with suppress(grpc.RpcError):
            served.stub.RankAudio(request)
        until(lambda: budget.held == 0)


def test_a_request_beyond_the_budget_is_refused_with_the_time_to_come_back(served: Served) -> None:
    budget = served.server.budget
    taken = hold(budget, "somebody else")
    taken.resize(MIB - 1000)
    with pytest.raises(grpc.RpcError, match="no memory for the request") as caught:
        served.stub.RankAudio(ranking(1.0, 2))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(caught.value).details)
    assert retry.retry_delay.ToNanoseconds() > 0
    taken.release()
    assert len(served.stub.RankAudio(ranking(1.0, 2)).ranking) == 2


@pytest.mark.parametrize("clips", [[0.01], [2.0] * 10], ids=["invalid", "beyond the budget"])
def test_the_message_of_a_refused_call_is_let_go(served: Served, clips: list[float]) -> None:
    """At once, not when the garbage collector finds the exception that gRPC keeps."""
    taken = hold(served.server.budget, "somebody else")
    taken.resize(MIB // 2)
    with grpc.insecure_channel(served.target) as channel:
        call: Any = channel.unary_unary("/milonga.v1.RewardService/RankAudio")
        message = pb.RankAudioRequest(prompt="a dog", clips=[float32(tone(one)) for one in clips])
        gc.collect()
        alive = _alive(pb.RankAudioRequest)
        gc.disable()
        try:
            for _ in range(5):
                with pytest.raises(grpc.RpcError):
                    call(message.SerializeToString())
            until(lambda: _alive(pb.RankAudioRequest) == alive)
        finally:
            gc.enable()
            taken.release()


def _alive(*kinds: type) -> int:
    """Return the number of messages of these kinds that are alive in this process."""
    return sum(type(one) in kinds for one in gc.get_objects())


_HELD = (inference.ModelInferRequest, pb.BatchComputeRewardsRequest, audio_pb2.PromptedClip, audio_pb2.Clip)


@pytest.mark.parametrize("rpc", ["BatchComputeRewards", "ModelInfer", "ModelStreamInfer"])
def test_the_message_of_a_call_is_let_go_when_it_is_decoded(rpc: str) -> None:
    """Not at its end. The call waits in the queue for others, which do not come."""
    prompt, sound = "a dog barks", tone(1.0)
    if rpc == "BatchComputeRewards":
        pair = audio_pb2.PromptedClip(prompt=prompt, clip=float32(sound))
        message = pb.BatchComputeRewardsRequest(pairs=[pair] * 4).SerializeToString()
        method = f"/milonga.v1.RewardService/{rpc}"
        del pair
    else:
        inputs = [
            tensor("PROMPT", "BYTES", [[prompt]] * 4),
            tensor("AUDIO", "FP32", [sound] * 4),
            tensor("SAMPLE_RATE", "INT32", [[16_000]] * 4),
        ]
        message = inference_request("reward", inputs).SerializeToString()
        method = f"/inference.GRPCInferenceService/{rpc}"
    with (
        serving(tiny_reward(tiny_clap()), max_wait_seconds=60) as served,
        grpc.insecure_channel(served.target) as channel,
    ):
        gc.collect()
        alive = _alive(*_HELD)
        gc.disable()
        try:
            stream: Any = channel.stream_stream(method)
            call = stream(iter([message]))
            until(lambda: served.scorer.batcher.stats.queue_cost > 0)
            assert _alive(*_HELD) == alive
            call.cancel()
            until(lambda: served.server.budget.held == 0)
        finally:
            gc.enable()


def test_a_stream_is_read_as_far_as_there_is_room() -> None:
    """A caller who sends faster than the service works is slowed down. No message ends the stream."""
    sound, count = tone(1.0), 12
    inputs = [
        tensor("PROMPT", "BYTES", [["a dog barks"]] * 4),
        tensor("AUDIO", "FP32", [sound] * 4),
        tensor("SAMPLE_RATE", "INT32", [[16_000]] * 4),
    ]
    message = inference_request("reward", inputs).SerializeToString()
    limits = {"max_request_bytes": len(message), "max_held_bytes": 4 * len(message)}
    with (
        serving(tiny_reward(tiny_clap()), max_wait_seconds=0.2, **limits) as served,
        grpc.insecure_channel(served.target) as channel,
    ):
        stream: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        answers = [
            inference.ModelStreamInferResponse.FromString(one) for one in stream(iter([message] * count))
        ]
        assert len(answers) == count
        errors = {one.error_message[:42] for one in answers if one.error_message}
        assert errors <= {"the service has no memory for the request:"}
        assert served.server.budget.held == 0
