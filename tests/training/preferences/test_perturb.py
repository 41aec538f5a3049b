import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.errors import InvalidInputError, MilongaError, ServiceUnavailableError
from tests.training.preferences.conftest import Stages
from training.data.store import read_rows, write_rows
from training.loop.config import override
from training.preferences import llm
from training.preferences.captions import CAPTIONS, TEMPORAL
from training.preferences.llm import LLMConfig, LLMPerturber
from training.preferences.perturb import PerturbConfig, perturb_captions
from training.preferences.perturbation import BadAnswerError

CAPTION = "A dog barks then a siren wails"
KEY = "not-for-everyone"

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, content."""


def completion(content: str) -> Answer:
    body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    return 200, {}, json.dumps(body).encode()


def good(count: int, about: str = "") -> Answer:
    rows = [{"text": f"A cat number {i} meows then {about} wails", "change": "replace"} for i in range(count)]
    return completion(json.dumps({"captions": rows}))


class Endpoint:
    """An OpenAI-compatible endpoint on this machine: it gives `answers` in turn, then good ones."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.default: Callable[[dict[str, Any]], Answer] = lambda body: good(5, str(len(self.requests)))
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.requests.append({"path": self.path, **body})
                    endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                    answer = endpoint.answers.pop(0) if endpoint.answers else endpoint.default(body)
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def config(self) -> LLMConfig:
        return LLMConfig(base_url=self.url, model="tiny-llm", timeout=5, attempts=4, in_flight=3)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(llm.KEY_VARIABLE, KEY)
    monkeypatch.setattr(llm, "_FIRST_WAIT", 0.01)
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def test_it_asks_for_structured_output_and_keeps_the_answer(endpoint: Endpoint, tmp_path: Path) -> None:
    perturber = LLMPerturber(endpoint.config, tmp_path)
    found = perturber.perturb(CAPTION, "2", 5)
    assert len(found) == 5
    assert {one.kind for one in found} == {"replace"}
    (request,) = endpoint.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "tiny-llm"
    assert request["response_format"]["json_schema"]["strict"] is True
    assert json.dumps(CAPTION) in request["messages"][1]["content"]
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"
    # Asked again it comes from disk; asked for something else it does not. The key stands nowhere.
    assert LLMPerturber(endpoint.config, tmp_path).perturb(CAPTION, "2", 5) == found
    assert len(endpoint.requests) == 1
    perturber.perturb(CAPTION, "3", 5)
    assert len(endpoint.requests) == 2
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


def test_without_a_key_none_is_sent(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(llm.KEY_VARIABLE)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert LLMPerturber(endpoint.config, tmp_path).perturb(CAPTION, "2", 5)
    assert "authorization" not in endpoint.headers[0]


def test_passing_refusals_are_waited_for(endpoint: Endpoint, tmp_path: Path, waits: list[float]) -> None:
    endpoint.answers = [(429, {"Retry-After": "7"}, b"slow down"), (503, {}, b""), (500, {}, b"{}")]
    assert LLMPerturber(endpoint.config, tmp_path).perturb(CAPTION, "2", 5)
    assert waits[0] == 7
    assert 0 < waits[1] < waits[2] * 2 < 0.2
    assert len(endpoint.requests) == 4


def test_a_date_to_come_back_at_is_understood(
    endpoint: Endpoint, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_445_412_470.0)
    endpoint.answers = [(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"")]
    LLMPerturber(endpoint.config, tmp_path).perturb(CAPTION, "2", 5)
    assert waits == [10.0]


def test_an_endpoint_that_stays_away_ends_it(
    endpoint: Endpoint, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.default = lambda body: (503, {}, b"")
    with pytest.raises(ServiceUnavailableError, match=r"status 503.*request 4"):
        LLMPerturber(endpoint.config, tmp_path).perturb(CAPTION, "2", 5)
    endpoint.answers = [(429, {"Retry-After": "86400"}, b"")]
    with pytest.raises(ServiceUnavailableError, match="come back in 86400 s"):
        LLMPerturber(endpoint.config, tmp_path).perturb(CAPTION, "2", 5)
    gone = replace(endpoint.config, base_url="http://127.0.0.1:9/v1", attempts=2)
    with pytest.raises(ServiceUnavailableError, match="refused"):
        LLMPerturber(gone, tmp_path).perturb(CAPTION, "2", 5)


def test_a_timeout_is_tried_again(endpoint: Endpoint, tmp_path: Path, waits: list[float]) -> None:
    slow = threading.Event()

    def answer(body: dict[str, Any]) -> Answer:
        if not slow.is_set():
            slow.set()
            threading.Event().wait(0.3)
        return good(5)

    endpoint.default = answer
    assert LLMPerturber(replace(endpoint.config, timeout=0.1), tmp_path).perturb(CAPTION, "2", 5)
    assert len(waits) >= 1


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_refusals_for_good_end_it_at_once_and_tell_no_key(
    endpoint: Endpoint, tmp_path: Path, status: int
) -> None:
    endpoint.answers = [
        (status, {"Location": "http://127.0.0.1:9/"}, b'{"error": {"message": "no such model"}}')
    ]
    with pytest.raises(MilongaError, match=f"status {status} .no such model.") as told:
        LLMPerturber(endpoint.config, tmp_path).perturb(CAPTION, "2", 5)
    assert KEY not in str(told.value)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    "content",
    [
        "I am sorry",
        '{"captions": []}',
        '{"captions": "none"}',
        json.dumps({"captions": [{"text": CAPTION + ".", "change": "swap"}] * 5}),
        json.dumps({"captions": [{"text": "word " * 50 + str(i), "change": "add"} for i in range(5)]}),
        json.dumps({"captions": [{"text": "", "change": "add"}] * 5}),
    ],
)
def test_useless_answers_are_asked_for_again(endpoint: Endpoint, tmp_path: Path, content: str) -> None:
    perturber = LLMPerturber(endpoint.config, tmp_path)
    endpoint.answers = [completion(content)] * 2
    assert len(perturber.perturb(CAPTION, "2", 5)) == 5
    assert len(endpoint.requests) == 3
    endpoint.answers = [completion(content)] * 3
    with pytest.raises(BadAnswerError):
        perturber.perturb("Birds sing", "2", 5)
    assert len(list(tmp_path.iterdir())) == 1


def test_endpoints_without_schemas_answer_in_fences(endpoint: Endpoint, tmp_path: Path) -> None:
    rows = [{"text": f"A cat meows then siren {i} wails", "change": "other"} for i in range(2)]
    endpoint.answers = [completion(f"```json\n{json.dumps({'captions': rows})}\n```")]
    found = LLMPerturber(replace(endpoint.config, structured="none"), tmp_path).perturb(CAPTION, "3", 2)
    assert [one.kind for one in found] == ["reword", "reword"]
    assert "response_format" not in endpoint.requests[0]


def test_address_and_model_come_from_the_environment(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (llm.URL_VARIABLE, llm.MODEL_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InvalidInputError, match="MILONGA_LLM_URL"):
        LLMPerturber(LLMConfig(), tmp_path)
    with pytest.raises(InvalidInputError, match=r"llm\.base_url"):
        LLMPerturber(LLMConfig(base_url="file:///etc", model="x"), tmp_path)
    monkeypatch.setenv(llm.URL_VARIABLE, endpoint.url)
    with pytest.raises(InvalidInputError, match="MILONGA_LLM_MODEL"):
        LLMPerturber(LLMConfig(), tmp_path)
    monkeypatch.setenv(llm.MODEL_VARIABLE, "from-outside")
    assert LLMPerturber(LLMConfig(), tmp_path).perturb(CAPTION, "2", 5)
    assert endpoint.requests[0]["model"] == "from-outside"


def test_the_stage_with_an_llm_skips_bad_answers_and_asks_nothing_twice(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    captions = tmp_path / "captions"
    write_rows(captions / CAPTIONS, [{"caption": f"Sound {i} rings", "cluster": 0} for i in range(8)])
    write_rows(captions / TEMPORAL, [{"caption": "Rain falls then a dog barks"}])
    endpoint.default = lambda body: (
        completion("no") if "Sound 3" in body["messages"][1]["content"] else good(5, "a siren")
    )
    config = PerturbConfig(perturber="llm", llm=replace(endpoint.config, bad_answers=0))
    report = perturb_captions(config, captions, tmp_path / "out")
    assert report["bad_answers"] == 1
    assert report["bad"][0]["caption"] == "Sound 3 rings"
    assert report["by_strategy"] == {"2": 35, "3": 5}
    asked = len(endpoint.requests)
    assert asked == 9
    # Stopped before the end: what was answered lies on disk.
    for name in ("report.json", "perturbed.jsonl"):
        (tmp_path / "out" / name).unlink()
    perturb_captions(replace(config, llm=replace(config.llm, in_flight=1)), captions, tmp_path / "out")
    assert len(endpoint.requests) == asked + 1


def test_the_stage_with_rules(stages: Stages, tmp_path: Path) -> None:
    rows = read_rows(stages.perturbed / "perturbed.jsonl")
    assert {row["strategy"] for row in rows} == {"2", "3"}
    config = override(PerturbConfig(), ["concept=0", "temporal=1", "temporal_kinds=swap"])
    report = perturb_captions(config, stages.captions, tmp_path / "swaps")
    assert report["by_kind"] == {"swap": 3}
    with pytest.raises(InvalidInputError, match="no kind of mistake"):
        override(PerturbConfig(), ["temporal_kinds=turn"])
