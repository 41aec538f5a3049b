"""The spans of a reward call, from its client to the batch of the model."""

from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as triton
from opentelemetry.trace import StatusCode

from services.client import AudioClient
from services.errors import InvalidInputError
from services.models.reward.model import RewardModel
from services.runtime.batch_pace import BatchPace
from tests.services.inference.asking import tensor
from tests.services.reward.serving import MODEL, Served, serving, tone, wav
from tests.services.traces import Traces, attributes, recording, seconds

REWARDS, RANK = "milonga.v1.RewardService/BatchComputeRewards", "milonga.v1.RewardService/RankAudio"
INFER = "inference.GRPCInferenceService/ModelInfer"
PROMPT = "a secret prompt"
WAV = wav(tone()).audio


@pytest.fixture
def client(served: Served) -> Iterator[AudioClient]:
    served.scorer.batcher._queue.pace = BatchPace()  # batches are as large as they may be
    with AudioClient(reward=served.target, retries=0) as client:
        yield client


@pytest.fixture
def traces(client: AudioClient) -> Iterator[Traces]:
    with recording() as traces:
        yield traces


@pytest.mark.parametrize("rpc", [REWARDS, RANK])
def test_a_call_decodes_waits_and_scores(client: AudioClient, traces: Traces, rpc: str) -> None:
    if rpc == RANK:
        client.rank_audio(PROMPT, [WAV, WAV])
    else:
        client.compute_rewards([(PROMPT, WAV), (PROMPT, WAV)])
    caller, service = traces.one(rpc, "CLIENT"), traces.one(rpc, "SERVER")
    assert traces.children(caller) == [rpc]
    assert traces.children(service) == ["decode", "score"]
    assert traces.children(traces.one("score")) == ["queue", "model"]
    assert attributes(traces.one("score")) == {"milonga.clips": 2, "milonga.model_digest": MODEL.digest}
    assert attributes(traces.one("model")) == {"milonga.batch": 2}
    assert seconds(traces.one("decode")) + seconds(traces.one("score")) <= seconds(service)
    traces.check()
    assert PROMPT not in str([span.to_json() for span in traces.spans])


def test_items_that_take_several_batches_have_a_span_for_each(model: RewardModel) -> None:
    with (
        serving(model, max_batch_seconds=0.1) as served,
        AudioClient(reward=served.target) as client,
        recording() as traces,
    ):
        client.compute_rewards([(PROMPT, WAV)] * 3)
        traces.one(REWARDS, "SERVER")
        assert traces.children(traces.one("score")) == ["queue", "model"] * 3


def test_a_refusal_is_the_callers_error(client: AudioClient, traces: Traces) -> None:
    with pytest.raises(InvalidInputError):
        client.rank_audio(PROMPT, [b"no sound"])
    caller, service = traces.one(RANK, "CLIENT"), traces.one(RANK, "SERVER")
    assert (caller.status.status_code, service.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert attributes(service)["error.type"] == "INVALID_ARGUMENT"
    assert traces.children(service) == ["decode"]
    traces.check()


def test_the_open_inference_protocol_has_the_same_stages(served: Served, traces: Traces) -> None:
    samples = tone()
    inputs = [
        tensor("PROMPT", "BYTES", [[PROMPT.encode()]]),
        tensor("AUDIO", "FP32", samples[np.newaxis]),
        tensor("SAMPLE_RATE", "INT32", [[16_000]]),
    ]
    with triton.InferenceServerClient(served.target) as caller:
        caller.infer("reward", inputs)
    service = traces.one(INFER, "SERVER")
    assert service.parent is None
    assert traces.children(service) == ["decode", "score"]
    traces.check()
