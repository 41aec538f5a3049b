"""What a call is counted as: malformed, oversized, expired and cancelled ones, on a real server."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from milonga.v1 import generation_pb2 as pb
from services.client import AudioClient, Finished
from services.engine import Engine
from services.runtime.gate import MAX_CALLS
from tests.services.generation.serving import serving, tiny_engine
from tests.services.runtime import answering
from tests.services.runtime.answering import Answering
from tests.waiting import until

SERVICE = "/milonga.v1.GenerationService"
UNARY, STREAM = "GenerateAudio", "StreamGenerateAudio"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tiny_engine() as engine:
        yield engine


@pytest.fixture
def served(engine: Engine) -> Iterator[Any]:
    with serving(engine, max_request_bytes=10_000) as served:
        yield served


def call(served: Any, rpc: str, message: bytes, **options: Any) -> grpc.StatusCode:
    """Call an rpc with bytes; return the status."""
    with grpc.insecure_channel(served.target) as channel:
        multi: Any = channel.unary_stream if rpc == STREAM else channel.unary_unary
        try:
            answers = multi(f"{SERVICE}/{rpc}")(message, **options)
            if rpc == STREAM:
                list(answers)
        except grpc.RpcError as error:
            code: Any = getattr(error, "code", None)
            return code()
    return grpc.StatusCode.OK


def message(rpc: str, inner: pb.GenerateAudioRequest) -> bytes:
    return (pb.StreamGenerateAudioRequest(request=inner) if rpc == STREAM else inner).SerializeToString()


def counts(served: Any, rpc: str) -> dict[str, float]:
    """Return the number of calls by code."""
    samples = next(iter(served.metrics.requests.collect())).samples
    return {
        sample.labels["code"]: sample.value
        for sample in samples
        if sample.name.endswith("_total") and sample.labels["rpc"] == rpc
    }


@pytest.mark.parametrize("rpc", [UNARY, STREAM])
@pytest.mark.parametrize("rubbish", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"\x07"])
def test_a_malformed_message_is_the_callers_fault(served: Any, rpc: str, rubbish: bytes) -> None:
    assert call(served, rpc, rubbish) is grpc.StatusCode.INVALID_ARGUMENT
    until(lambda: counts(served, rpc) == {"INVALID_ARGUMENT": 1})


@pytest.mark.parametrize("rpc", [UNARY, STREAM])
def test_an_oversized_message_is_counted(served: Any, rpc: str) -> None:
    big = message(rpc, pb.GenerateAudioRequest(prompt="a" * 10_001))
    assert call(served, rpc, big) is grpc.StatusCode.RESOURCE_EXHAUSTED
    until(lambda: counts(served, rpc) == {"RESOURCE_EXHAUSTED": 1})


async def test_calls_beyond_those_of_a_connection_wait_with_their_caller() -> None:
    async with answering.answering(seconds=0.02) as service:
        codes = await asyncio.gather(*(service.code() for _ in range(5 * MAX_CALLS)))
        assert set(codes) == {grpc.StatusCode.OK}


def start(service: Answering, method: str, timeout: float) -> Any:
    """Start a call; return it."""
    channel: Any = service.channel
    rpc = channel.unary_stream if method == answering.STREAM else channel.unary_unary
    return rpc(method)(b"x", timeout=timeout)


async def counted(service: Answering, method: str, code: str, number: int) -> int:
    """Wait until `number` calls are counted, and return how many are; all must have the code."""
    rpc = method.rpartition("/")[2]
    async with asyncio.timeout(60):
        while sum(counts(service, rpc).values()) < number:
            await asyncio.sleep(0.01)
    found = counts(service, rpc)
    assert set(found) == {code}
    return int(found[code])


@pytest.mark.parametrize("method", [answering.GENERATE, answering.STREAM])
async def test_calls_that_expire_are_counted_as_their_callers_saw_them(method: str) -> None:
    async with answering.answering(seconds=600) as service:
        await service.channel.channel_ready()
        calls = [start(service, method, 0.5 + 0.05 * number) for number in range(20)]
        codes = await asyncio.gather(*(call.code() for call in calls))
        assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        # On a busy machine, a call may expire before it reaches the service.
        assert service.callers
        assert await counted(service, method, "DEADLINE_EXCEEDED", len(service.callers)) <= 20


@pytest.mark.parametrize("method", [answering.GENERATE, answering.STREAM])
async def test_calls_that_are_cancelled_early_are_counted_as_cancelled(method: str) -> None:
    async with answering.answering(seconds=600) as service:
        calls = [start(service, method, 600) for _ in range(5)]
        async with asyncio.timeout(60):
            while len(service.callers) < 5:
                await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        assert await counted(service, method, "CANCELLED", 5) == 5


def test_streams_that_callers_leave_at_the_last_value_have_succeeded(served: Any) -> None:
    with AudioClient(served.target, retries=0) as client:
        for _ in range(20):
            for update in client.stream("a dog barks", num_inference_steps=1, duration=0.64):
                if isinstance(update, Finished):
                    break
    until(lambda: counts(served, STREAM) == {"OK": 20})


def test_a_caller_that_gives_up_while_it_sends_its_message_has_cancelled(served: Any) -> None:
    async def give_up() -> None:
        async def never() -> AsyncIterator[bytes]:
            await asyncio.sleep(600)
            yield b""

        async with grpc.aio.insecure_channel(served.target) as channel:
            rpc: Any = channel.stream_unary(f"{SERVICE}/{UNARY}")
            running = rpc(never())
            await asyncio.sleep(1.5)
            running.cancel()

    asyncio.run(give_up())
    until(lambda: counts(served, UNARY) == {"CANCELLED": 1})


def test_a_call_without_a_message_does_not_reach_the_servicer(served: Any) -> None:
    with grpc.insecure_channel(served.target) as channel:
        answer: Any = channel.stream_unary(f"{SERVICE}/{UNARY}")
        with pytest.raises(grpc.RpcError, match="has no message"):
            answer(iter(()))


def test_the_histogram_of_durations_has_the_code(served: Any) -> None:
    assert call(served, UNARY, b"\xff") is grpc.StatusCode.INVALID_ARGUMENT
    labels = {"rpc": UNARY, "code": "INVALID_ARGUMENT"}
    registry = served.metrics.registry
    until(lambda: registry.get_sample_value("milonga_request_seconds_count", labels) == 1)
