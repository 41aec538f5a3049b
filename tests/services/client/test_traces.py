"""The spans of calls that the client repeats, or makes for one another."""

import grpc

from services.client import AudioClient
from tests.services.client.serving import Refusal, Told, ask
from tests.services.traces import attributes, recording

UNARY = "milonga.v1.GenerationService/GenerateAudio"


def test_a_call_with_retries_is_one_span(target: str, told: Told, face: str, waits: list[float]) -> None:
    told.refusals += [
        Refusal(code=grpc.StatusCode.UNAVAILABLE),
        Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=1.0),
    ]
    with recording() as traces:
        ask(face, lambda client: client.generate("a dog", clip_count=1), target)
    span = traces.one(UNARY)
    assert attributes(span)["rpc.response.status_code"] == "OK"
    assert [event.attributes and event.attributes["milonga.wait_seconds"] for event in span.events] == waits
    # Each attempt continues the same trace.
    sent = {metadata["traceparent"] for metadata in told.metadata}
    assert len(told.metadata) == 3
    assert len(sent) == 1
    assert span.context is not None
    assert f"{span.context.trace_id:032x}-{span.context.span_id:016x}" in sent.pop()


def test_the_best_of_several_clips_is_one_trace(target: str, face: str) -> None:
    with recording() as traces:
        ask(face, lambda client: client.generate_best("a dog", candidates=5, seed=1), target)
    best = traces.one("generate_best")
    assert attributes(best) == {"milonga.clips": 5}
    methods = [name.rpartition("/")[2] for name in traces.children(best)]
    assert methods[:2] == ["GetRewardModel", "GetModel"]
    assert methods.count("GenerateAudio") == 2
    assert "BatchComputeRewards" in methods


def test_without_traces_no_context_is_sent(target: str, told: Told) -> None:
    with AudioClient(target) as client:
        client.generate("a dog", clip_count=1)
    assert "traceparent" not in told.metadata[0]
