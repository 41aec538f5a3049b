"""The scoring service asked by NVIDIA's tritonclient, on tiny models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from milonga.v1 import scoring_pb2 as pb
from milonga.v1 import scoring_pb2_grpc as rpc
from milonga.v1.audio_pb2 import PromptedClip
from services.models.manifest import read_manifest
from tests.services.audio.sounds import antiphase, file_of, float32, silent_flac, tone
from tests.services.inference.asking import parameters, refusal, tensor
from tests.services.scoring.serving import Served, serving

PROMPTS = ["a dog barks then a siren wails", "a bell rings"]
TONES = [tone(0.5), tone(0.5, hertz=880.0)]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.hosted.target) as client:
        yield client


def _prompts(*prompts: Any) -> triton.InferInput:
    return tensor("PROMPT", "BYTES", np.array(prompts, dtype=object).reshape(-1, 1))


def _rates(*rates: int) -> triton.InferInput:
    return tensor("SAMPLE_RATE", "INT32", [[rate] for rate in rates])


def _samples(
    prompts: list[Any] = PROMPTS, audio: Any = TONES, rates: list[int] | None = None
) -> list[triton.InferInput]:
    inputs = [_prompts(*prompts), tensor("AUDIO", "FP32", audio)]
    return [*inputs, _rates(*([16_000] * len(prompts) if rates is None else rates))]


def _files(*files: bytes) -> list[triton.InferInput]:
    return [_prompts(*PROMPTS[: len(files)]), tensor("ENCODED_AUDIO", "BYTES", [[file] for file in files])]


def test_samples_score_as_through_the_native_api(
    client: triton.InferenceServerClient, stub: rpc.ScoringServiceStub, folders: dict[str, Path]
) -> None:
    pairs = [PromptedClip(prompt=p, clip=float32(t)) for p, t in zip(PROMPTS, TONES, strict=True)]
    native = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=pairs))
    result = client.infer("clap", _samples())
    assert result.as_numpy("SCORE").dtype == np.float32
    np.testing.assert_allclose(result.as_numpy("SCORE"), [one.scores for one in native.results], atol=1e-6)
    told = parameters(result)
    assert told["scorers"] == "a,b,a2"
    for name, folder in (("a", "a"), ("b", "b"), ("a2", "a")):
        assert told[f"name.{name}"] == f"tiny-{folder}"
        assert told[f"version.{name}"] == "1"
        assert told[f"digest.{name}"] == read_manifest(folders[folder]).digest
    assert result.get_response().model_version == "1"


def test_files_score_as_their_samples(client: triton.InferenceServerClient) -> None:
    files = [file_of(one, subtype="FLOAT") for one in TONES]
    of_samples = client.infer("clap", _samples()).as_numpy("SCORE")
    of_files = client.infer("clap", _files(*files)).as_numpy("SCORE")
    np.testing.assert_allclose(of_files, of_samples, atol=1e-6)
    agreeing = [*_files(*files), _rates(16_000, 16_000)]
    np.testing.assert_allclose(client.infer("clap", agreeing).as_numpy("SCORE"), of_files, atol=1e-6)


def test_warnings_name_their_row(client: triton.InferenceServerClient) -> None:
    told = parameters(client.infer("clap", _files(file_of(TONES[0]), file_of(antiphase(0.5)))))
    assert told["warnings"].startswith("row 1: clip has channels that cancel each other")
    assert "warnings" not in parameters(client.infer("clap", _samples()))
    result = client.infer("clap", _samples(["a dog", "a zebra"]))
    assert result.as_numpy("READABLE").tolist() == [[True] * 3, [False] * 3]
    assert not result.as_numpy("SCORE")[1].any()
    told = parameters(result)
    assert told["warnings"].startswith(
        "row 1: prompt has words that the model does not know: zebra, and none"
    )


def test_metadata_count_the_scorers(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("clap")
    assert [(one.name, one.datatype, list(one.shape)) for one in metadata.outputs] == [
        ("SCORE", "FP32", [-1, 3]),
        ("READABLE", "BOOL", [-1, 3]),
        ("DIGEST", "BYTES", [-1, 3]),
    ]
    assert {one.name: one.datatype for one in metadata.inputs} == {
        "PROMPT": "BYTES",
        "AUDIO": "FP32",
        "SAMPLE_RATE": "INT32",
        "ENCODED_AUDIO": "BYTES",
    }
    config = client.get_model_config("clap", as_json=True)["config"]
    assert config["parameters"]["max_rows"]["string_value"] == "64"
    assert not config["model_transaction_policy"]


async def test_asyncio_and_streams(served: Served) -> None:
    async with triton_aio.InferenceServerClient(served.hosted.target) as client:
        one = await client.infer("clap", _samples())

        async def requests() -> Any:
            for number in range(3):
                yield {"model_name": "clap", "inputs": _samples(), "request_id": str(number)}

        ids = set()
        async for result, error in client.stream_infer(requests()):
            assert error is None
            assert parameters(result)["triton_final_response"] is True
            np.testing.assert_allclose(result.as_numpy("SCORE"), one.as_numpy("SCORE"), atol=1e-6)
            ids.add(result.get_response().id)
        assert ids == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (_samples()[1:], "prompt: tensor PROMPT is missing, expected BYTES [n, 1]"),
        (_samples()[:1], "audio: tensor AUDIO is missing, expected FP32 [n, samples]; or ENCODED"),
        (
            _samples()[:2],
            "sample_rate_hertz: tensor SAMPLE_RATE is missing, expected INT32 [n, 1]: AUDIO ",
        ),
        (_samples(audio=TONES[0]), "audio: tensor AUDIO has shape [8000], expected FP32 [n, samples]"),
        (
            _samples(PROMPTS[:1], rates=[16_000]),
            "audio: tensor AUDIO has 2 rows, expected 1, as many as PROMPT",
        ),
        (_samples([b"\xff", "a dog"]), "prompt[0]: tensor PROMPT is not UTF-8 from byte 0 on"),
        (_samples(["", "a dog"]), "pairs[0].prompt: is empty"),
        (_samples(rates=[7, 16_000]), "pairs[0].clip.sample_rate_hertz: is 7, must be between 8000"),
        (_samples(rates=[16_000, -1]), "pairs[1].clip.sample_rate_hertz: is -1, must be between 8000"),
        (_samples(audio=[[0.0] * 10] * 2), "pairs[0].clip.audio: lasts 0.000625 s"),
        (_samples(audio=[[float("nan")] * 8000] * 2), "pairs[0].clip.audio: holds NaN or infinity"),
        (
            _samples(["a"] * 65, [[0.0] * 8000] * 65),
            "prompt: tensor PROMPT has 65 rows, expected between 1 and 64; split them into several requests",
        ),
        (_samples([], np.zeros((0, 8000))), "prompt: tensor PROMPT has 0 rows, expected between 1 and 64"),
        (_samples() + _files(b"x", b"y")[1:], "audio: has both tensors AUDIO and ENCODED_AUDIO"),
        (_files(b"nonsense"), "pairs[0].clip.audio: begins with 6e 6f 6e 73"),
        (_files(b""), "pairs[0].clip.audio: is empty"),
        (_files(silent_flac(1)), "pairs[0].clip.audio: lasts 3600 s"),
    ],
)
def test_bad_input(client: triton.InferenceServerClient, inputs: list[Any], says: str) -> None:
    status, message = refusal(lambda: client.infer("clap", inputs))
    assert status == "INVALID_ARGUMENT"
    assert message.startswith(says)


def test_nobody_loads_scorers(client: triton.InferenceServerClient) -> None:
    assert refusal(lambda: client.load_model("clap"))[0] == "UNIMPLEMENTED"


def test_a_large_request_is_taken_in(uris: dict[str, str]) -> None:
    """Beyond gRPC's usual 4 MiB: three clips of a minute at 48 kHz."""
    with serving({"a": uris["a"]}) as served, triton.InferenceServerClient(served.hosted.target) as client:
        audio = np.zeros((3, 60 * 48_000), dtype=np.float32)
        result = client.infer("clap", _samples(["a dog"] * 3, audio, [48_000] * 3))
        assert result.as_numpy("SCORE").shape == (3, 1)
