"""What is no clip: judgements, models, health, metrics, documentation, limits and errors of HTTP."""

import base64
import contextlib
import io
import json
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from services.catalogue import CATALOGUE
from services.errors import InvalidInputError
from services.processes import free_port
from services.runtime.settings import load_settings
from services.runtime.tokens import token_digest
from services.web import SERVICES
from services.web.serve import bind
from services.web.settings import WebSettings
from tests.services.generation.serving import Serving, serving
from tests.services.web.hosting import calling, faults, hosting_web
from tests.waiting import until

PROMPT = "a dog barks"
SECRET = "milonga_" + "s" * 43


@pytest.fixture(scope="module")
def clip() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(np.arange(16_000) * 0.1), 16_000, format="FLAC")
    return buffer.getvalue()


def test_scores_rewards_and_captions_of_sounds_in_json(http: httpx.Client, clip: bytes) -> None:
    sound = base64.b64encode(clip).decode()
    pairs = [{"prompt": PROMPT, "audio": sound}, {"prompt": "a siren wails", "audio": sound}]
    scores = http.post("/v1/audio/scores", json={"pairs": pairs}).json()
    assert [one["name"] for one in scores["scorers"]] == ["a"]
    assert all(-1 <= one["values"]["a"] <= 1 for one in scores["scores"])
    rewards = http.post("/v1/audio/rewards", json={"pairs": pairs}).json()
    assert [0 < one["probability"] < 1 for one in rewards["rewards"]] == [True, True]
    captions = http.post("/v1/audio/captions", json={"clips": [sound], "beams": [2], "max_candidates": 1})
    (caption,) = captions.json()["captions"]
    assert caption["text"] == caption["candidates"][0]["text"]


def test_a_file_as_the_whole_body(http: httpx.Client, clip: bytes) -> None:
    headers = {"Content-Type": "audio/flac"}
    in_json = http.post(
        "/v1/audio/scores", json={"pairs": [{"prompt": PROMPT, "audio": base64.b64encode(clip).decode()}]}
    )
    whole = http.post("/v1/audio/scores", params={"prompt": PROMPT}, content=clip, headers=headers)
    assert whole.json() == in_json.json()
    assert http.post("/v1/audio/captions", content=clip, headers=headers).json()["captions"]


def test_an_explanation_has_a_value_for_each_word_and_frame(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "audio_length": 0.64}
    found = http.post("/v1/audio/explanations", json=body).json()
    assert [word["word"] for word in found["words"]] == ["a", "dog", "barks"]
    info = soundfile.info(io.BytesIO(base64.b64decode(found["audio"])))
    assert {len(word["values"]) for word in found["words"]} == {round(info.duration / found["frame_seconds"])}
    wrong = http.post("/v1/audio/explanations", json={**body, "audio_length": 99, "method": "x"})
    assert set(faults(wrong)) == {"audio_length", "method"}


@pytest.mark.parametrize(
    ("path", "body", "field", "says"),
    [
        ("scores", {"pairs": []}, "pairs", "at least 1 item"),
        ("scores", {"pairs": [{"prompt": PROMPT}]}, "pairs[0].audio", "is missing"),
        ("scores", {"pairs": [{"prompt": PROMPT, "audio": "%%%"}]}, "pairs[0].audio", "must be base64"),
        ("scores", {"pairs": [{"prompt": PROMPT, "audio": "QUJD"}]}, "pairs[0].audio", "no WAV, FLAC or OGG"),
        ("rewards", {"pairs": [{"prompt": "", "audio": "QUJD"}]}, "pairs[0].prompt", "is empty"),
        ("captions", {"clips": ["QUJD"]}, "clips[0]", "no WAV, FLAC or OGG"),
        ("captions", {"clips": "QUJD"}, "clips", "valid array"),
    ],
)
def test_wrong_sounds_are_named_by_the_fields_of_the_body(
    http: httpx.Client, path: str, body: object, field: str, says: str
) -> None:
    response = http.post(f"/v1/audio/{path}", json=body)
    assert response.status_code == 400
    assert says in faults(response)[field]


def test_a_file_needs_its_prompt_and_a_known_type(http: httpx.Client, clip: bytes) -> None:
    response = http.post("/v1/audio/scores", content=clip, headers={"Content-Type": "audio/flac"})
    assert "is missing" in faults(response)["prompt"]
    response = http.post("/v1/audio/scores", content=clip, headers={"Content-Type": "image/png"})
    assert "must be application/json" in faults(response)["Content-Type"]


@pytest.mark.parametrize(
    ("path", "query", "field", "says"),
    [
        ("/v1/audio/generate", "output_format=mp3_44100_128", "output_format", "is unknown in the query"),
        ("/v1/audio/generate", "seed=7&seed=8&" + "x" * 200, "seed", "is unknown in the query"),
        ("/v1/sound-generation", "seconds=2", "seconds", "is unknown in the query"),
        (
            "/v1/sound-generation",
            "output_format=wav_16000&output_format=wav_16000",
            "output_format",
            "is given twice in the query",
        ),
        ("/v1/audio/scores", "prompt=rain", "prompt", "is unknown in the query"),
        ("/v1/audio/captions", "beams=2", "beams", "is unknown in the query"),
        ("/v1/provenance", "trust=x", "trust", "is unknown in the query"),
    ],
)
def test_what_is_unknown_in_a_query_is_named_and_not_ignored(
    http: httpx.Client, path: str, query: str, field: str, says: str
) -> None:
    key = {"/v1/audio/generate": "input", "/v1/sound-generation": "text"}.get(path)
    sound = base64.b64encode(b"RIFF").decode()
    body = {key: PROMPT} if key else {"pairs": [{"prompt": PROMPT, "audio": sound}]}
    response = http.post(f"{path}?{query}", json={"clips": [sound]} if "captions" in path else body)
    assert response.status_code == 400
    assert says in faults(response)[field]


def test_a_files_query_has_one_prompt_and_nothing_else(http: httpx.Client, clip: bytes) -> None:
    headers = {"Content-Type": "audio/flac"}
    for query, field, says in (
        ("prompt=a&prompt=b", "prompt", "is given twice"),
        ("prompt=a&scorers=a", "scorers", "is unknown"),
    ):
        response = http.post(f"/v1/audio/scores?{query}", content=clip, headers=headers)
        assert says in faults(response)[field]
    response = http.post("/v1/audio/captions?prompt=a", content=clip, headers=headers)
    assert "is unknown" in faults(response)["prompt"]


def test_models_of_every_service(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()["data"]
    assert [model["kind"] for model in models] == [
        "generation",
        "scoring",
        "reward",
        "captioning",
        "explanation",
    ]
    assert models[0]["limits"]["schedulers"]
    assert models[0]["defaults"]["profile"] == ""
    assert [profile["name"] for profile in models[0]["profiles"]] == ["quality", "draft"]
    assert models[0]["profiles"][1]["num_inference_steps"] == 2


def test_health_names_every_service(http: httpx.Client) -> None:
    response = http.get("/health")
    assert (response.status_code, response.json()["status"]) == (200, "ok")
    assert set(response.json()["services"].values()) == {"SERVING"}
    assert http.get("/live").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/live"])
def test_probes_may_ask_for_the_head_alone(http: httpx.Client, path: str) -> None:
    response = http.head(path)
    assert (response.status_code, response.content) == (200, b"")


def test_metrics_count_by_route(http: httpx.Client) -> None:
    http.get("/v1/models")
    text = http.get("/metrics").text
    assert 'milonga_http_requests_total{code="200",method="GET",route="/v1/models"}' in text


def test_the_page_of_the_api_asks_no_other_machine_for_anything(http: httpx.Client) -> None:
    page = http.get("/docs").text
    assert "/v1/audio/generate" in page
    assert "audio_length" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    described = http.get("/openapi.json").json()
    assert "/v1/sound-generation" in described["paths"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v2", 404),
        ("GET", "/v1/audio/generate", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/../x", 404),
    ],
)
def test_errors_of_http_are_problem_details_too(
    http: httpx.Client, method: str, path: str, code: int
) -> None:
    response = http.request(method, path)
    assert (response.status_code, response.headers["content-type"]) == (code, "application/problem+json")
    assert response.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe{}", b'{"input": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"a":' * 20_000,
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_said_so(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/audio/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "path",
    ["/v1/audio/generate", "/v1/sound-generation", "/v1/audio/scores", "/v1/provenance", "/v1/ratings", "/"],
)
@pytest.mark.parametrize("chunked", [True, False])
def test_ten_megabytes_are_refused_before_they_are_read(http: httpx.Client, path: str, chunked: bool) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(10):
            yield bytes(2**20)

    try:
        response = http.post(path, content=parts() if chunked else bytes(10 * 2**20))
    except httpx.WriteError:
        return  # the connection was closed while the rest was being sent
    assert response.status_code == 413
    assert "is larger than" in response.json()["detail"]


def test_a_page_of_another_site_may_not_call(http: httpx.Client) -> None:
    response = http.post(
        "/v1/audio/generate", json={"input": PROMPT}, headers={"Origin": "https://evil.example"}
    )
    assert response.status_code == 403
    same = http.get("/v1/models", headers={"Origin": f"http://{http.base_url.netloc.decode()}"})
    assert same.status_code == 200


def test_wrong_headers_are_named(http: httpx.Client) -> None:
    response = http.get("/v1/models", headers={"X-Milonga-Priority": "high"})
    assert "must be interactive or batch" in faults(response)["x-milonga-priority"]
    assert http.get("/v1/models", headers={"Authorization": "Basic QTpC"}).status_code == 401


def _address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def _exchange(url: str, sent: bytes) -> bytes:
    """Send bytes, then nothing; return all that comes until the server closes the connection."""
    with socket.create_connection(_address(url), timeout=60) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(65_536):
            received += part
        return received


def test_slow_clients_are_told_or_disconnected(generating: Serving) -> None:
    with hosting_web(generation=generating.target, body_seconds=0.3) as url:
        assert _exchange(url, b"") == b""
        assert _exchange(url, b"POST /v1/audio/generate HTTP/1.1\r\nHost: x\r\n") == b""
        head = (
            b"POST /v1/audio/generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n"
        )
        assert _exchange(url, head + b'{"input').startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_on_is_disconnected(generating: Serving) -> None:
    with (
        hosting_web(generation=generating.target, send_seconds=0.3) as url,
        socket.create_connection(_address(url), timeout=60) as connection,
    ):
        # Answers of some ten megabytes, which no buffer holds.
        count = 1000
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * count)
        ended = select.poll()
        ended.register(connection, 0)  # a reset is reported without being asked for
        assert ended.poll(60_000)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                received += part
        assert received.count(b"HTTP/1.1 200 OK") < count
        with calling(url) as http:
            assert "milonga_http_requests_in_flight 1.0" in http.get("/metrics").text


def test_more_requests_or_bytes_than_there_is_room_for_are_refused(generating: Serving) -> None:
    with (
        hosting_web(generation=generating.target, max_held_bytes=1000, max_requests=1) as url,
        calling(url) as http,
    ):
        response = http.post("/v1/audio/generate", content=b" " * 2000)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        with socket.create_connection(_address(url), timeout=60) as held:
            held.sendall(b"POST /v1/audio/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
            until(lambda: http.get("/live").status_code == 503)
        until(lambda: http.get("/live").status_code == 200)


def test_a_service_that_is_away_is_unavailable_and_one_without_address_is_not_implemented() -> None:
    with hosting_web(generation=f"127.0.0.1:{free_port()}") as url, calling(url) as http:
        response = http.post("/v1/audio/generate", json={"input": PROMPT})
        assert (response.status_code, response.headers["content-type"]) == (503, "application/problem+json")
        health = http.get("/health")
        assert (health.status_code, health.json()["services"]) == (503, {"generation": "UNREACHABLE"})
        assert http.get("/live").status_code == 200
        response = http.post("/v1/audio/scores", json={"pairs": []})
        assert response.status_code == 501
        assert "--scoring" in response.json()["detail"]


@pytest.fixture(scope="module")
def guarded(generating: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a web door in front of a service that knows its callers."""
    path: Path = tmp_path_factory.mktemp("callers") / "callers.toml"
    path.write_text(
        f"[callers.studio]\ntokens = ['{token_digest(SECRET)}']\nroles = ['caller', 'batch']\n"
        "work_per_minute = 20\n"
    )
    with (
        serving(generating.engine, callers_file=path) as served,
        hosting_web(generation=served.target) as url,
    ):
        yield url


@pytest.mark.parametrize("header", ["Authorization", "xi-api-key"])
def test_tokens_and_priorities_of_callers_are_passed_on(guarded: str, header: str) -> None:
    value = f"Bearer {SECRET}" if header == "Authorization" else SECRET
    with calling(guarded) as http:
        refused = http.get("/v1/models")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        wrong = http.get("/v1/models", headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 401
        headers = {header: value, "X-Milonga-Priority": "batch"}
        assert http.get("/v1/models", headers=headers).status_code == 200


def test_a_quota_that_is_used_up_says_when_to_come_again(guarded: str) -> None:
    with calling(guarded, Authorization=f"Bearer {SECRET}") as http:
        body = {"input": PROMPT, "num_inference_steps": 10, "audio_length": 0.64}
        found = [http.post("/v1/audio/generate", json=body) for _ in range(5)][-1]
        assert found.status_code == 429
        assert int(found.headers["retry-after"]) >= 1
        assert found.json()["retry_after"] > 0


def test_without_a_token_nothing_is_passed_on_from_other_machines(generating: Serving) -> None:
    with hosting_web(generation=generating.target, anonymous="refused") as url, calling(url) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/health").status_code == 200
    assert not load_settings(WebSettings, listen="0.0.0.0:0").admits_anonymous
    assert load_settings(WebSettings, listen="127.0.0.1:0").admits_anonymous


def test_every_service_of_the_catalogue_has_its_setting() -> None:
    assert set(SERVICES) == set(CATALOGUE)
    assert set(SERVICES) <= WebSettings.model_fields.keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"listen": "unix:/tmp/x"}, "must be host:port"),
        ({"listen": "8080"}, "must be host:port"),
        ({"services_tls_ca_file": Path("ca.pem")}, "need services_tls"),
        ({"tls_cert_file": Path("a.pem")}, "tls_key_file"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        load_settings(WebSettings, **settings)


def test_addresses_and_ports_are_checked_at_the_start(generating: Serving) -> None:
    with pytest.raises(InvalidInputError, match="a URL"), hosting_web(generation="http://host:1"):
        pass
    with pytest.raises(InvalidInputError, match="can't listen on"):
        bind(generating.target)


def test_connections_send_at_once() -> None:
    with bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP  # by which asyncio knows to set TCP_NODELAY
            assert client.getpeername() == listener.getsockname()


def test_problem_details_hold_json_only(http: httpx.Client) -> None:
    response = http.post("/v1/audio/generate", json={"input": PROMPT, "audio_length": 99})
    problem = json.loads(response.text)
    assert problem["type"] == "urn:milonga:problem:InvalidInputError"
    assert (problem["title"], problem["status"]) == ("Bad Request", 400)
    assert problem["detail"].startswith("audio_length: is 99 s")
