"""The captioning service asked by NVIDIA's tritonclient, on tiny models."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from milonga.v1 import captioning_pb2 as pb
from services.models.captioner.model import Captioner
from tests.services.captioning.serving import CLAP_MODEL, MODEL, Served, serving
from tests.services.inference.asking import parameters, refusal, tensor
from tests.services.reward.serving import float32, tone, wav

TONES = [tone(), tone(hertz=880.0)]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.target) as client:
        yield client


def _inputs(datatype: str, audio: Any, *rates: int) -> list[triton.InferInput]:
    inputs = [tensor("AUDIO", datatype, audio)]
    return [*inputs, tensor("SAMPLE_RATE", "INT32", [[rate] for rate in rates])] if rates else inputs


def test_captions_are_those_of_the_native_api(client: triton.InferenceServerClient, served: Served) -> None:
    native = served.stub.CaptionAudio(pb.CaptionAudioRequest(clips=map(float32, TONES))).captions
    result = client.infer("caption", _inputs("FP32", TONES, 16_000, 16_000))
    assert result.as_numpy("CAPTION").tolist() == [[one.text.encode()] for one in native]
    candidates = [[candidate.text.encode() for candidate in one.candidates] for one in native]
    assert result.as_numpy("CANDIDATES").tolist() == candidates
    scores = result.as_numpy("SCORES")
    assert (scores.dtype, scores.shape) == (np.float32, (2, 2))
    np.testing.assert_allclose(
        scores, [[candidate.clap_score for candidate in one.candidates] for one in native], atol=1e-5
    )
    assert result.as_numpy("DIGEST").tolist() == [[MODEL.digest.encode()]] * 2
    assert parameters(result) == {
        "name": "tiny",
        "version": "2",
        "digest": MODEL.digest,
        "scorer": "clap",
        "scorer_digest": CLAP_MODEL.digest,
    }
    assert result.get_response().model_version == "2"


def test_files_are_described_too(client: triton.InferenceServerClient) -> None:
    of_samples = client.infer("caption", _inputs("FP32", TONES, 16_000, 16_000))
    of_files = client.infer(
        "caption", [tensor("ENCODED_AUDIO", "BYTES", [[wav(one).audio] for one in TONES])]
    )
    assert of_files.as_numpy("CAPTION").tolist() == of_samples.as_numpy("CAPTION").tolist()


def test_without_a_scorer_there_are_no_scores(captioner: Captioner) -> None:
    with serving(captioner) as served, triton.InferenceServerClient(served.target) as client:
        result = client.infer("caption", _inputs("FP32", TONES, 16_000, 16_000))
    assert np.isnan(result.as_numpy("SCORES")).all()
    assert "scorer" not in parameters(result)


def test_the_server_says_what_it_serves(client: triton.InferenceServerClient) -> None:
    assert client.is_model_ready("caption", "2")
    outputs = client.get_model_metadata("caption").outputs
    assert [(one.name, list(one.shape)) for one in outputs] == [
        ("CAPTION", [-1, 1]),
        ("CANDIDATES", [-1, -1]),
        ("SCORES", [-1, -1]),
        ("DIGEST", [-1, 1]),
    ]
    config = client.get_model_config("caption").config
    assert config.parameters["max_duration"].string_value == "30"


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "audio: tensor AUDIO is missing"),
        (_inputs("FP32", TONES), "sample_rate_hertz: tensor SAMPLE_RATE is missing"),
        (_inputs("INT32", np.zeros((2, 8000)), 16_000, 16_000), "audio: tensor AUDIO has datatype INT32"),
        (_inputs("FP32", TONES, 1, 2, 3), "sample_rate_hertz: tensor SAMPLE_RATE has 3 rows, expected 2"),
        (_inputs("FP32", np.zeros((1, 8000)), 16_000), "clips[0].audio: is silent"),
        (
            [*_inputs("FP32", TONES, 16_000, 16_000), tensor("ENCODED_AUDIO", "BYTES", [[b"x"]] * 2)],
            "audio: has both tensors",
        ),
        ([tensor("ENCODED_AUDIO", "BYTES", [[b"nonsense"]])], "clips[0].audio: begins with 6e 6f 6e 73"),
    ],
)
def test_bad_input(client: triton.InferenceServerClient, inputs: list[Any], says: str) -> None:
    status, message = refusal(lambda: client.infer("caption", inputs))
    assert status == "INVALID_ARGUMENT"
    assert message.startswith(says)
