"""The spans of a generation, from its client to its encoded clips."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.trace import StatusCode

from milonga.v1 import generation_pb2 as pb
from services.client import AsyncAudioClient, AudioClient, Finished, GenerationOptions
from services.errors import DeadlineExceededError, InvalidInputError
from services.runtime import tracing
from tests.services.generation.serving import MODEL, Serving
from tests.services.traces import Traces, attributes, context, recording, seconds
from tests.waiting import until

UNARY = "milonga.v1.GenerationService/GenerateAudio"
STREAM = "milonga.v1.GenerationService/StreamGenerateAudio"
SHORT: GenerationOptions = {"duration": 0.64, "num_inference_steps": 3, "seed": 7}
STAGES = ["queue", "encode_text", "denoise", "decode", "encode_audio"]
PROMPT = "a secret prompt"


@pytest.fixture
def traces(served: Serving) -> Iterator[Traces]:
    until(lambda: not served.engine.stats.running)
    with recording() as traces:
        yield traces


def check_tree(traces: Traces, rpc: str, stages: list[str]) -> None:
    """Check that the client's span has the service's as its only child, and this one the stages."""
    client, service = traces.one(rpc, "CLIENT"), traces.one(rpc, "SERVER")
    assert traces.children(client) == [rpc]
    assert traces.children(service) == stages
    assert service.parent is not None
    assert service.parent.is_remote
    traces.check()


def test_a_call_has_a_span_for_each_of_its_stages(client: AudioClient, traces: Traces) -> None:
    client.generate(PROMPT, **SHORT)
    check_tree(traces, UNARY, STAGES)
    client_span, service = traces.one(UNARY, "CLIENT"), traces.one(UNARY, "SERVER")
    assert client_span.parent is None
    assert attributes(client_span) == {
        "rpc.system.name": "grpc", "rpc.method": UNARY, "rpc.response.status_code": "OK",
    }  # fmt: skip
    assert attributes(service)["milonga.priority"] == "interactive"
    assert attributes(service)["rpc.response.status_code"] == "OK"
    assert attributes(traces.one("denoise")) == {
        "milonga.steps": 3, "milonga.clips": 1, "milonga.batch": 1.0,
        "milonga.model_digest": MODEL.identity.digest,
    }  # fmt: skip
    stages = sum(seconds(traces.one(name)) for name in STAGES)
    assert stages <= seconds(service) <= seconds(client_span)
    assert PROMPT not in str([span.to_json() for span in traces.spans])


def test_stages_follow_each_other(client: AudioClient, traces: Traces) -> None:
    client.generate(PROMPT, **SHORT)
    service = traces.one(UNARY, "SERVER")
    # The clocks of stages and of spans are converted: within a millisecond.
    ends = np.array([service.start_time] + [traces.one(name).end_time for name in STAGES])
    starts = np.array([traces.one(name).start_time for name in STAGES] + [service.end_time])
    assert np.all(starts - ends > -1e6)


def test_a_stream_has_the_same_tree_when_it_is_left_at_its_last_value(
    client: AudioClient, traces: Traces
) -> None:
    for update in client.stream(PROMPT, **SHORT):
        if isinstance(update, Finished):
            break
    check_tree(traces, STREAM, STAGES)
    for kind in ("CLIENT", "SERVER"):
        assert attributes(traces.one(STREAM, kind))["rpc.response.status_code"] == "OK"


def test_every_clip_is_decoded_and_encoded_in_a_span(client: AudioClient, traces: Traces) -> None:
    options: GenerationOptions = {**SHORT, "clip_count": 3}
    client.generate(PROMPT, **options)
    traces.one(UNARY, "SERVER")
    assert len(traces.all("decode")) == len(traces.all("encode_audio")) == 3
    assert attributes(traces.one("denoise"))["milonga.clips"] == 3
    assert attributes(traces.one("denoise"))["milonga.batch"] == 3.0


def test_the_asyncio_client_continues_the_programs_own_trace(served: Serving, traces: Traces) -> None:
    async def stream(client: AsyncAudioClient) -> None:
        program = trace.get_current_span()
        async for _ in client.stream(PROMPT, **SHORT):
            assert trace.get_current_span() is program  # the call's span does not leak

    async def main() -> None:
        async with AsyncAudioClient(served.target, retries=0) as client:
            with tracing.span("program"):
                await asyncio.gather(client.generate(PROMPT, **SHORT), stream(client))

    asyncio.run(main())
    check_tree(traces, UNARY, STAGES)
    check_tree(traces, STREAM, STAGES)
    assert sorted(traces.children(traces.one("program"))) == sorted([UNARY, STREAM])


def test_a_foreign_client_continues_its_trace_by_the_header(served: Serving, traces: Traces) -> None:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    message = pb.GenerateAudioRequest(prompt=PROMPT, num_inference_steps=1).SerializeToString()
    with grpc.insecure_channel(served.target) as channel:
        call: Any = channel.unary_unary(f"/{UNARY}")
        call(message, metadata=[("traceparent", f"00-{trace_id}-{span_id}-01")])
        call(message, metadata=[("traceparent", "00-nonsense-01")])
    until(lambda: len(traces.all(UNARY)) == 2)
    first, second = traces.all(UNARY)
    assert f"{context(first).trace_id:032x}" == trace_id
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == span_id
    assert second.parent is None


def test_errors_set_the_status(client: AudioClient, traces: Traces) -> None:
    with pytest.raises(InvalidInputError):
        client.generate(PROMPT, num_inference_steps=100_000)
    caller, service = traces.one(UNARY, "CLIENT"), traces.one(UNARY, "SERVER")
    for span in (caller, service):
        assert attributes(span)["rpc.response.status_code"] == "INVALID_ARGUMENT"
        assert attributes(span)["error.type"] == "INVALID_ARGUMENT"
    # The caller's fault is no error of the service.
    assert (caller.status.status_code, service.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert traces.children(service) == []
    traces.check()


def test_a_deadline_is_an_error_of_both(client: AudioClient, traces: Traces) -> None:
    with pytest.raises(DeadlineExceededError):
        client.generate(PROMPT, num_inference_steps=1000, timeout=0.3)
    for kind in ("CLIENT", "SERVER"):
        span = traces.one(UNARY, kind)
        assert attributes(span)["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
        assert span.status.status_code is StatusCode.ERROR
    traces.check()


def test_a_cancelled_call_ends_its_spans(served: Serving, traces: Traces) -> None:
    async def cancel() -> None:
        async with AsyncAudioClient(served.target, retries=0) as client:
            running = asyncio.create_task(client.generate(PROMPT, num_inference_steps=1000))
            while not served.engine.stats.clip_steps - before:
                await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.wait([running])

    before = served.engine.stats.clip_steps
    asyncio.run(cancel())
    check_tree(traces, UNARY, ["queue", "encode_text", "denoise"])
    for kind in ("CLIENT", "SERVER"):
        assert attributes(traces.one(UNARY, kind))["rpc.response.status_code"] == "CANCELLED"


def test_a_stream_that_is_left_ends_its_spans(client: AudioClient, traces: Traces) -> None:
    for _ in client.stream(PROMPT, num_inference_steps=1000):
        break
    for kind in ("CLIENT", "SERVER"):
        assert attributes(traces.one(STREAM, kind))["rpc.response.status_code"] == "CANCELLED"
    assert traces.children(traces.one(STREAM, "SERVER"))[0] == "queue"
    traces.check()


def test_nothing_is_recorded_while_traces_are_off(client: AudioClient, served: Serving) -> None:
    with recording() as traces:
        tracing.use(None)
        client.generate(PROMPT, **SHORT)
    assert not traces.spans
    assert tracing.tracer() is None
