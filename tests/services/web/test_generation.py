"""Clips by HTTP, in both shapes, by httpx, curl and the openai client."""

import base64
import contextlib
import io
import json
import subprocess
from dataclasses import replace
from typing import Any

import httpx
import httpx2
import openai
import pytest
import soundfile

from services.client import AudioClient
from services.web.generation import HEARTBEAT_SECONDS, json_header
from services.web.shapes import AudioGenerateRequest, Format
from tests.services.generation.serving import Serving
from tests.services.web.hosting import faults
from tests.waiting import until

PROMPT = "a dog barks then a siren wails"
NATIVE, ELEVEN = "/v1/audio/generate", "/v1/sound-generation"


def _events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_the_clip_is_that_of_the_native_api(http: httpx.Client, generating: Serving) -> None:
    response = http.post(NATIVE, json={"input": PROMPT, "seed": 7, "num_inference_steps": 3})
    assert (response.status_code, response.headers["content-type"]) == (200, "audio/wav")
    with AudioClient(generating.target) as client:
        made = client.generate(PROMPT, seed=7, num_inference_steps=3)
    assert response.content == made.clips[0].audio
    assert response.headers["x-seed"] == "7"
    assert response.headers["x-model-digest"] == made.model.digest


@pytest.mark.parametrize(
    ("name", "kind", "subtype", "content_type"),
    [
        ("wav", "WAV", "PCM_16", "audio/wav"),
        ("flac", "FLAC", "PCM_16", "audio/flac"),
        ("ogg", "OGG", "VORBIS", "audio/ogg"),
        ("mp3", "MP3", "MPEG_LAYER_III", "audio/mpeg"),
        ("opus", "OGG", "OPUS", "audio/ogg; codecs=opus"),
    ],
)
def test_every_format_is_what_it_says(
    http: httpx.Client, name: str, kind: str, subtype: str, content_type: str
) -> None:
    response = http.post(NATIVE, json={"input": PROMPT, "response_format": name, "num_inference_steps": 1})
    assert response.headers["content-type"] == content_type
    info = soundfile.info(io.BytesIO(response.content))
    assert (info.format, info.subtype, info.samplerate) == (kind, subtype, 16_000)


def test_pcm_states_its_rate(http: httpx.Client) -> None:
    body = {"input": PROMPT, "response_format": "pcm", "num_inference_steps": 1, "audio_length": 0.64}
    response = http.post(NATIVE, json=body)
    assert response.headers["content-type"] == "audio/pcm; rate=16000; channels=1"
    assert len(response.content) == 2 * round(0.64 * 16_000)


def test_sounds_in_elevenlabs_shape_are_mp3_at_44100_hertz(http: httpx.Client) -> None:
    response = http.post(ELEVEN, json={"text": "rain", "duration_seconds": 0.64, "prompt_influence": 0.5})
    assert response.headers["content-type"] == "audio/mpeg"
    info = soundfile.info(io.BytesIO(response.content))
    assert (info.format, info.samplerate, info.duration) == ("MP3", 44_100, pytest.approx(0.64, abs=1e-3))
    assert "bit rate" in json.loads(response.headers["x-warnings"])[0]


@pytest.mark.parametrize("query", [True, False])
def test_an_output_format_in_the_query_or_in_the_body(http: httpx.Client, query: bool) -> None:
    given = {"output_format": "opus_24000_64"}
    body = {"text": "rain", "model_id": "eleven_text_to_sound_v2", "loop": False}
    response = http.post(ELEVEN, json=body if query else {**body, **given}, params=given if query else {})
    info = soundfile.info(io.BytesIO(response.content))
    assert (info.subtype, info.samplerate) == ("OPUS", 24_000)


def test_the_default_influence_gives_the_default_guidance(http: httpx.Client, generating: Serving) -> None:
    body = {"text": PROMPT, "prompt_influence": 0.3, "output_format": "wav_16000"}
    defaults = http.get("/v1/models").json()["data"][0]["defaults"]
    first = http.post(ELEVEN, json=body)
    with AudioClient(generating.target) as client:
        made = client.generate(
            PROMPT, seed=int(first.headers["x-seed"]), guidance_scale=defaults["guidance_scale"]
        )
    assert first.content == made.clips[0].audio


def test_curl_needs_no_content_type(door: str) -> None:
    body = json.dumps({"input": PROMPT, "response_format": "mp3", "seed": 7, "num_inference_steps": 1})
    command = ["curl", "-s", "--noproxy", "*", f"{door}{NATIVE}", "-d", body, "-w", "%{stderr}%{http_code}"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert done.stderr == b"200"
    assert soundfile.info(io.BytesIO(done.stdout)).format == "MP3"


def test_the_openai_client_lists_models_and_makes_clips(door: str) -> None:
    with (
        httpx2.Client(trust_env=False) as transport,
        openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0, http_client=transport) as client,
    ):
        models = list(client.models.list())
        assert models[0].id == "tiny"
        body = {"input": PROMPT, "model": models[0].id, "response_format": "flac", "num_inference_steps": 1}
        made = client.post("/audio/generate", body=body, cast_to=httpx2.Response)
        assert soundfile.info(io.BytesIO(made.content)).format == "FLAC"
        with pytest.raises(openai.NotFoundError) as caught:
            client.post("/audio/generate", body={**body, "model": "other"}, cast_to=httpx2.Response)
    assert caught.value.status_code == 404


def test_progress_arrives_as_events(http: httpx.Client) -> None:
    body = {"input": PROMPT, "seed": 3, "num_inference_steps": 4, "stream_format": "sse"}
    response = http.post(NATIVE, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = _events(response.text)
    names = [name for name, _ in events]
    assert names[0] == "queued"
    assert names[-1] == "finished"
    assert [data["step"] for name, data in events if name == "progress"] == [1, 2, 3, 4]
    (clip,) = (data for name, data in events if name == "clip")
    plain = http.post(NATIVE, json={**body, "stream_format": "audio"})
    assert base64.b64decode(clip["audio"]) == plain.content
    assert HEARTBEAT_SECONDS > 0


def test_events_of_the_other_shape_by_the_header(http: httpx.Client) -> None:
    response = http.post(ELEVEN, json={"text": "rain"}, headers={"Accept": "text/event-stream"})
    assert [name for name, _ in _events(response.text)][-1] == "finished"


def test_a_wrong_field_of_a_stream_has_a_status_of_its_own(http: httpx.Client) -> None:
    response = http.post(NATIVE, json={"input": PROMPT, "audio_length": 99, "stream_format": "sse"})
    assert response.status_code == 400
    assert "must be between" in faults(response)["audio_length"]


@pytest.mark.parametrize("stream", ["audio", "sse"])
def test_a_client_that_goes_away_cancels_the_call(
    http: httpx.Client, generating: Serving, stream: str
) -> None:
    labels = {"rpc": "StreamGenerateAudio", "code": "CANCELLED"}

    def cancelled() -> float:
        return generating.metrics.registry.get_sample_value("milonga_requests_total", labels) or 0

    before = cancelled()
    body = {"input": PROMPT, "num_inference_steps": 1000, "stream_format": stream}
    timeout = httpx.Timeout(60, read=0.5)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        http.stream("POST", NATIVE, json=body, timeout=timeout) as sent,
    ):
        next(sent.iter_raw())
    until(lambda: cancelled() == before + 1)


@pytest.mark.parametrize(
    ("path", "body", "field", "says"),
    [
        (NATIVE, {}, "input", "is missing"),
        (NATIVE, {"input": ""}, "input", "is empty"),
        (NATIVE, {"input": 3}, "input", "is 3: input should be a valid string"),
        (NATIVE, {"input": PROMPT, "seed": "7"}, "seed", "is '7': input should be a valid integer"),
        (NATIVE, {"input": PROMPT, "seed": True}, "seed", "valid integer"),
        (NATIVE, {"input": PROMPT, "seed": -1}, "seed", "-1"),
        (NATIVE, {"input": PROMPT, "audio_length": [1]}, "audio_length", "of type list"),
        (NATIVE, {"input": PROMPT, "audio_length": 99}, "audio_length", "is 99 s, must be between"),
        (NATIVE, {"input": PROMPT, "num_inference_steps": 0}, "num_inference_steps", "between 1 and"),
        (NATIVE, {"input": PROMPT, "voice": "x"}, "voice", "is unknown; leave it out"),
        (NATIVE, {"input": PROMPT, "speed": 2}, "speed", "must be 1.0 or left out"),
        (NATIVE, {"input": PROMPT, "audio_start": 3.5}, "audio_start", "must be 0.0 or left out"),
        (NATIVE, {"input": PROMPT, "response_format": "aac"}, "response_format", "'wav', 'flac'"),
        (NATIVE, {"input": PROMPT, "scheduler": "euler"}, "scheduler", "must be one of"),
        (NATIVE, {"input": PROMPT, "guidance_stop": 2}, "guidance_stop", "must be between 0 and 1"),
        (NATIVE, {"input": PROMPT, "profile": "best"}, "profile", "must be one of quality, draft"),
        (
            NATIVE,
            {"input": PROMPT, "response_format": "opus", "sample_rate": 44_100},
            "sample_rate",
            "which opus can't hold, must be one of 8000",
        ),
        (ELEVEN, {"text": "\ud800"}, "text", "can't carry"),
        (ELEVEN, {"text": "rain", "loop": True}, "loop", "clips are not made to loop"),
        (ELEVEN, {"text": "rain", "prompt_influence": 1.5}, "prompt_influence", "less than or equal to 1"),
        (ELEVEN, {"text": "rain", "duration_seconds": 99.5}, "duration_seconds", "is 99.5 s"),
        (ELEVEN, {"text": "rain", "output_format": "ulaw_8000"}, "output_format", "codec is not made"),
        (ELEVEN, {"text": "rain", "output_format": "mp3"}, "output_format", "CODEC_RATE"),
        (ELEVEN, {"text": "rain", "output_format": "opus_44100"}, "output_format", "can't hold"),
        (ELEVEN, {"text": "rain", "output_format": "mp3_1"}, "output_format", "between 8000 and"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_remedy(
    http: httpx.Client, path: str, body: dict[str, object], field: str, says: str
) -> None:
    response = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert says in faults(response)[field]


def test_all_wrong_fields_at_once(http: httpx.Client) -> None:
    body = {"input": "", "audio_length": 99, "num_inference_steps": 0, "guidance_scale": -1}
    assert set(faults(http.post(NATIVE, json=body))) == set(body)


@pytest.mark.parametrize(("path", "field"), [(NATIVE, "model"), (ELEVEN, "model_id")])
def test_an_unknown_model_is_not_found(http: httpx.Client, path: str, field: str) -> None:
    body = {"input" if path == NATIVE else "text": PROMPT, field: "stable-audio"}
    response = http.post(path, json=body)
    assert response.status_code == 404
    assert "must be tiny or tiny@1" in faults(response)[field]


def test_warnings_are_a_json_list_whatever_their_length(http: httpx.Client) -> None:
    words = " ".join(f"zébra{number}𝄞" for number in range(60))
    response = http.post(NATIVE, json={"input": f"a dog {words}", "num_inference_steps": 1})
    header = response.headers["x-warnings"]
    assert "zébra0𝄞, " in "".join(json.loads(header))
    assert len(header) <= 2000


def test_warnings_that_are_too_long_are_cut() -> None:
    assert json.loads(json_header(["a", "b"])) == ["a", "b"]
    first, second, third = json.loads(json_header(["a", "𝄞" * 3000, "b"]))
    assert (first, second[-2:], third) == ("a", "𝄞…", "b")
    assert json.loads(json_header(["a" * 1960, "b" * 100])) == ["a" * 1960]


@pytest.mark.parametrize(
    ("own", "name", "rate"),
    [(44_100, "opus", 48_000), (44_100, "mp3", None), (16_000, "opus", None), (32_000, "opus", 48_000)],
)
def test_a_rate_that_a_format_can_not_hold_becomes_one_that_it_can(
    generating: Serving, own: int, name: Format, rate: int | None
) -> None:
    served = generating.engine.description
    served = replace(served, geometry=replace(served.geometry, sampling_rate=own))
    plan = AudioGenerateRequest(input=PROMPT, response_format=name).plan(served)
    assert plan.options["sampling_rate"] == rate
