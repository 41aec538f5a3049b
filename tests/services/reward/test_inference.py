"""The reward service asked by NVIDIA's tritonclient, on a tiny model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from milonga.v1 import reward_pb2 as pb
from milonga.v1.audio_pb2 import PromptedClip
from tests.services.inference.asking import parameters, refusal, tensor
from tests.services.reward.serving import MODEL, Served, float32, tone, wav

PROMPTS = ["a dog barks then a siren wails", "a bell rings"]
TONES = [tone(), tone(hertz=880.0)]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.target) as client:
        yield client


def _inputs(prompts: list[Any], datatype: str, audio: Any, *rates: int) -> list[triton.InferInput]:
    inputs = [tensor("PROMPT", "BYTES", [[prompt] for prompt in prompts]), tensor("AUDIO", datatype, audio)]
    return [*inputs, tensor("SAMPLE_RATE", "INT32", [[rate] for rate in rates])] if rates else inputs


def test_rewards_are_those_of_the_native_api(client: triton.InferenceServerClient, served: Served) -> None:
    pairs = [PromptedClip(prompt=p, clip=float32(t)) for p, t in zip(PROMPTS, TONES, strict=True)]
    native = served.stub.BatchComputeRewards(pb.BatchComputeRewardsRequest(pairs=pairs)).rewards
    result = client.infer("reward", _inputs(PROMPTS, "FP32", TONES, 16_000, 16_000))
    for name, field in (("REWARD", "logit"), ("PROBABILITY", "probability")):
        made = result.as_numpy(name)
        assert (made.dtype, made.shape) == (np.float32, (2, 1))
        np.testing.assert_allclose(made[:, 0], [getattr(one, field) for one in native], atol=1e-5)
    assert result.as_numpy("DIGEST").tolist() == [[MODEL.digest.encode()]] * 2
    assert parameters(result) == {"name": "tiny", "version": "2", "digest": MODEL.digest}
    assert result.get_response().model_version == "2"


def test_files_are_scored_too(client: triton.InferenceServerClient) -> None:
    of_samples = client.infer("reward", _inputs(PROMPTS, "FP32", TONES, 16_000, 16_000))
    files = tensor("ENCODED_AUDIO", "BYTES", [[wav(one).audio] for one in TONES])
    of_files = client.infer("reward", [*_inputs(PROMPTS, "FP32", TONES)[:1], files])
    np.testing.assert_allclose(of_files.as_numpy("REWARD"), of_samples.as_numpy("REWARD"), atol=1e-2)


def test_the_server_says_what_it_serves(client: triton.InferenceServerClient) -> None:
    assert client.is_model_ready("reward", "2")
    outputs = client.get_model_metadata("reward").outputs
    assert [(one.name, list(one.shape)) for one in outputs] == [
        ("REWARD", [-1, 1]),
        ("PROBABILITY", [-1, 1]),
        ("READABLE", [-1, 1]),
        ("DIGEST", [-1, 1]),
    ]
    client.infer("reward", _inputs(PROMPTS, "FP32", TONES, 16_000, 16_000))
    (stats,) = client.get_inference_statistics("reward").model_stats
    assert (stats.version, stats.inference_count % 2) == ("2", 0)
    assert stats.inference_count > 0


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (_inputs(PROMPTS, "FP32", TONES), "sample_rate_hertz: tensor SAMPLE_RATE is missing"),
        (_inputs(["a", "\x07"], "FP32", TONES, 16_000, 16_000), "pairs[1].prompt: "),
        (
            _inputs(PROMPTS, "INT32", np.zeros((2, 8000)), 16_000, 16_000),
            "audio: tensor AUDIO has datatype INT32",
        ),
        (_inputs(PROMPTS, "FP32", TONES, 1, 2, 3), "sample_rate_hertz: tensor SAMPLE_RATE has 3 rows"),
    ],
)
def test_bad_input(client: triton.InferenceServerClient, inputs: list[Any], says: str) -> None:
    status, message = refusal(lambda: client.infer("reward", inputs))
    assert status == "INVALID_ARGUMENT"
    assert message.startswith(says)
    assert refusal(lambda: client.infer("clap", inputs))[0] == "NOT_FOUND"
