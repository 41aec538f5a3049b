"""The spans of a scoring call, from its client to the batches of its scorers."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from services.client import AsyncAudioClient, AudioClient
from services.errors import InvalidInputError
from tests.services.audio.sounds import file_of, tone
from tests.services.scoring.serving import Served, forget_times
from tests.services.scoring.test_servicer import _held
from tests.services.traces import Traces, attributes, recording, seconds
from tests.waiting import until

RPC = "milonga.v1.ScoringService"
SCORE, EMBED_AUDIO, EMBED_TEXT = (
    f"{RPC}/BatchScoreAudio",
    f"{RPC}/BatchEmbedAudio",
    f"{RPC}/BatchEmbedText",
)
PROMPT = "a secret prompt"
FLAC = file_of(tone(), kind="FLAC")


@pytest.fixture
def client(served: Served) -> Iterator[AudioClient]:
    forget_times(served.scorers)
    with AudioClient(scoring=served.hosted.target, retries=0) as client:
        yield client


@pytest.fixture
def traces(client: AudioClient) -> Iterator[Traces]:
    with recording() as traces:
        yield traces


def service_span(traces: Traces, rpc: str) -> ReadableSpan:
    """Return the service's span, which is the only child of the client's."""
    service = traces.one(rpc, "SERVER")
    assert traces.children(traces.one(rpc, "CLIENT")) == [rpc]
    return service


def test_a_score_decodes_then_embeds_both_by_every_scorer(client: AudioClient, traces: Traces) -> None:
    client.score_audio([(PROMPT, FLAC), ("rain", FLAC)], scorers=["a"])
    service = service_span(traces, SCORE)
    first, *embedded = traces.children(service)
    assert (first, sorted(embedded)) == ("decode", ["embed_audio", "embed_text"])
    for name in embedded:
        assert traces.children(traces.one(name)) == ["queue", "model"]
    assert attributes(traces.one("decode")) == {"milonga.clips": 2}
    assert {attributes(span)["milonga.batch"] for span in traces.all("model")} == {2}
    audio = attributes(traces.one("embed_audio"))
    assert audio["milonga.clips"] == 2
    assert str(audio["milonga.model_digest"]).startswith("sha256:")
    assert seconds(traces.one("decode")) + seconds(traces.one("embed_audio")) <= seconds(service)
    traces.check()
    assert PROMPT not in str([span.to_json() for span in traces.spans])


def test_embeddings_have_spans_too(client: AudioClient, traces: Traces) -> None:
    client.embed_audio([FLAC], scorers=["a", "b"])
    assert traces.children(service_span(traces, EMBED_AUDIO)) == ["decode", "embed_audio", "embed_audio"]
    client.embed_text([PROMPT], scorers=["b"])
    assert traces.children(service_span(traces, EMBED_TEXT)) == ["embed_text"]
    traces.check()


def test_calls_that_share_a_batch_keep_their_own_traces(
    served: Served, client: AudioClient, traces: Traces
) -> None:
    scorer = served.scorers["a"]
    with ThreadPoolExecutor(3) as threads, _held(scorer) as entered:
        calls = [threads.submit(client.embed_audio, [FLAC], scorers=["a"])]
        assert entered.wait(20)
        calls += [threads.submit(client.embed_audio, [FLAC], scorers=["a"]) for _ in range(2)]
        until(lambda: len(scorer.audio._queue) == 2)
    for call in calls:
        call.result(20)
    batches = sorted(attributes(span)["milonga.batch"] for span in traces.all("model"))  # type: ignore[type-var]
    assert batches == [1, 2, 2]
    for span in traces.all("embed_audio"):
        assert traces.children(span) == ["queue", "model"]
    assert len({span.context.trace_id for span in traces.all("model") if span.context}) == 3
    traces.check()


def test_a_refusal_ends_the_span_of_its_stage(client: AudioClient, traces: Traces) -> None:
    with pytest.raises(InvalidInputError):
        client.score_audio([(PROMPT, b"no sound")])
    service = service_span(traces, SCORE)
    assert attributes(service)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert traces.children(service) == ["decode"]
    assert traces.one("decode").status.status_code is StatusCode.ERROR
    assert attributes(traces.one("decode"))["error.type"] == "InvalidInputError"
    traces.check()


def test_a_call_that_is_cancelled_in_the_queue_ends_its_spans(
    served: Served, client: AudioClient, traces: Traces
) -> None:
    async def cancel() -> None:
        async with AsyncAudioClient(scoring=served.hosted.target, retries=0) as other:
            running = asyncio.create_task(other.embed_audio([FLAC], scorers=["a"]))
            while not served.scorers["a"].audio.stats.queue_cost:
                await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.wait([running])

    with ThreadPoolExecutor(1) as threads, _held(served.scorers["a"]) as entered:
        first = threads.submit(client.embed_audio, [FLAC], scorers=["a"])
        assert entered.wait(20)
        asyncio.run(cancel())
        service = traces.one(EMBED_AUDIO, "SERVER")
        assert attributes(service)["rpc.response.status_code"] == "CANCELLED"
        assert attributes(traces.one(EMBED_AUDIO, "CLIENT"))["rpc.response.status_code"] == "CANCELLED"
        assert traces.children(service) == ["decode", "embed_audio"]
        assert traces.children(traces.one("embed_audio")) == ["queue"]
        traces.check()
    first.result(20)
