"""Malformed requests to the web door: each is answered, none by a fault of ours."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import httpx

from services.ratings.store import Verdict
from tests.fuzz.fuzzing import TEXTS, mutated, run
from tests.services.generation.serving import serving, tiny_engine
from tests.services.ratings.studies import planned_store
from tests.services.web.hosting import calling, hosting_web

PATHS: Final = (
    "/v1/audio/generate", "/v1/sound-generation", "/v1/audio/scores", "/v1/audio/captions", "/v1/models",
    "/health", "/docs", "/%00", "/v1/audio/generate?output_format=x",
    "/v1/sound-generation?output_format=%ff", "/v1/audio/scores?prompt=a&prompt=%00", "/v1/ratings?a",
    "/v1/audio/rewards", "/v1/audio/explanations",
    "/v1/provenance", "/v1/ratings", "/v1/ratings/next", "/v1/ratings/1", "/v1/ratings/%2d1",
    "/v1/ratings/99999999999999999999", "/v1/ratings/summary", "/v1/ratings/clips/%00", "/v1/ratings/clips/a",
)  # fmt: skip
BODIES: Final[tuple[dict[str, Any], ...]] = (
    {"input": "a dog barks", "num_inference_steps": 1, "audio_length": 0.64, "seed": 1},
    {"text": "a dog barks", "duration_seconds": 0.64, "prompt_influence": 0.1, "output_format": "wav_16000"},
    {"pairs": [{"prompt": "a dog barks", "audio": "UklGRg=="}]},
    {"clips": ["UklGRg=="], "beams": [2]},
    {"prompt": "a dog barks", "method": "occlusion", "audio": "UklGRg=="},
    {"item": 1, "verdict": "left", "left_present": True, "right_in_order": None},
)
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**64, -(2**70), 0.5, 1e308, float("nan"), float("inf"), [], {}, [[]],
    {"a": 1},
    "wav", "mp3", "sse", *TEXTS,
)  # fmt: skip
HEADERS: Final = (
    ("Content-Type", "application/json"), ("Content-Type", "text/plain"), ("Content-Type", "audio/wav"),
    ("Content-Type", "application/json; charset=utf-16"), ("Accept", "text/event-stream"),
    ("Authorization", "Bearer"), ("Authorization", "Bearer a b"), ("Authorization", "Bearer \xff"),
    ("X-Milonga-Priority", "x"), ("xi-api-key", ""), ("Origin", "null"), ("Origin", "http://[::1"),
    ("Content-Encoding", "gzip"), ("Transfer-Encoding", "chunked"), ("Expect", "100-continue"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...]


def _make(rng: random.Random) -> Request:
    body = dict(rng.choice(BODIES))
    for _ in range(rng.randrange(3)):
        body[rng.choice([*body, "model", "x", *rng.choice(BODIES)])] = rng.choice(VALUES)
    content = json.dumps(body).encode()
    if rng.random() < 0.3:
        content = mutated(rng, content)
    headers = tuple(rng.sample(HEADERS, rng.randrange(3)))
    methods = ("POST",) * 6 + ("GET", "PUT", "HEAD", "DELETE")
    return Request(rng.choice(methods), rng.choice(PATHS), content, headers)


def test_http(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/ratings.db"
    store = planned_store(database)
    with (
        tiny_engine() as engine,
        serving(engine) as served,
        hosting_web(generation=served.target, body_seconds=20, ratings=database) as url,
        calling(url, Authorization=f"Bearer {store.add_rater('ann')}") as http,
    ):

        def check(made: object) -> None:
            assert isinstance(made, Request)
            headers = [(name, value.encode("latin-1")) for name, value in made.headers]
            sent = http.build_request(made.method, made.path, content=made.body)
            for name, value in headers:
                if name != "Transfer-Encoding":
                    sent.headers[name] = value.decode("latin-1")
            response = http.send(sent)
            assert response.status_code not in (500, 502), response.text
            kind = response.headers.get("content-type", "")
            if response.status_code >= 400 and made.method != "HEAD" and made.path not in ("/health",):
                assert kind == "application/problem+json", response.text
                assert response.json()["status"] == response.status_code

        run("http", 120, _make, check)
        assert all(one.verdict in get_args(Verdict) and one.item <= 15 for one in store.ratings())
        assert http.get("/health").status_code == httpx.codes.OK
