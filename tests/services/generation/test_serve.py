"""The service as a program: a process, its logs, its signals, its exit codes."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.client import AudioClient, Finished, Progress
from services.errors import InvalidInputError, ModelNotFoundError, UnauthenticatedError
from services.generation.serve import SERVICE
from services.generation.settings import GenerationSettings
from services.runtime.serving import run
from services.runtime.settings import load_settings
from tests.programs import environment
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


COMMAND = [sys.executable, "-m", "services.generation"]
ANY_PORT = {"MILONGA_LISTEN": "127.0.0.1:0"}


@contextmanager
def _service(**settings: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, object], list[str]]]:
    """Start the program, wait until it says that it is ready; give its process, that line, and its log."""
    env = environment(**ANY_PORT, **settings)
    process = subprocess.Popen(COMMAND, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    ready: dict[str, object] = {}
    for line in process.stderr:
        lines.append(line)
        if '"event": "ready"' in line:
            ready = json.loads(line)
            break
    assert ready, lines
    rest = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    rest.start()
    try:
        yield process, ready, lines
    finally:
        process.kill()
        process.wait()
        rest.join()
        process.stderr.close()


def test_sigterm_drains_gracefully(folder: Path) -> None:
    settings = {"MILONGA_DRAIN_DELAY_SECONDS": "1", "MILONGA_HEALTH_PORT": "0", "MILONGA_METRICS_PORT": "0"}
    with _service(MILONGA_MODEL=f"file:{folder}", **settings) as (process, ready, lines):
        made: list[object] = []
        begun = threading.Event()

        def generate_slowly(client: AudioClient) -> None:
            for update in client.stream("a dog barks", num_inference_steps=200):
                made.append(update)
                if isinstance(update, Progress):
                    begun.set()

        with (
            AudioClient(f"127.0.0.1:{ready['port']}", retries=0) as client,
            grpc.insecure_channel(f"127.0.0.1:{ready['health_port']}") as channel,
        ):
            client.get_model()
            slow = threading.Thread(target=generate_slowly, args=(client,))
            slow.start()
            assert begun.wait(60)
            process.send_signal(signal.SIGTERM)
            health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no rpc
            watch = health.Watch(health_pb2.HealthCheckRequest())
            statuses = []
            for response in watch:
                statuses.append(response.status)
                if response.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break
            assert client.generate("a siren wails").clips  # still served while routers learn
            slow.join()
        assert process.wait(60) == 0
        assert isinstance(made[-1], Finished)
        assert statuses[-1] == health_pb2.HealthCheckResponse.NOT_SERVING
    events = [json.loads(line) for line in lines]
    assert events[0]["event"] == "settings"
    assert events[0]["model"] == f"file:{folder}"
    assert ready["model"] == "tiny"
    assert str(ready["digest"]).startswith("sha256:")
    story = [event["event"] for event in events]
    assert [event for event in story if event != "call"] == ["settings", "ready", "draining", "stopped"]
    assert story.count("call") == 3


def _refusal(**settings: str) -> str:
    """Return the one line with which the program refuses to start, and check its exit code."""
    env = environment(**{**ANY_PORT, **settings})
    done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in done.stderr.splitlines() if not line.startswith('{"')]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = errors
    assert line.startswith("error: ")
    return line


def test_wrong_models_are_refused_at_start(folder: Path, tmp_path: Path) -> None:
    for unset in ({}, {"MILONGA_MODEL": "", "MILONGA_UNPINNED_MODEL": ""}):
        line = _refusal(**unset)
        assert line.startswith(
            "error: model: is empty: there is no pin; `milonga promote bootstrap` sets one"
        )
        assert "MILONGA_MODEL" in line
    assert "unpinned_model: is 'maxi'" in _refusal(MILONGA_UNPINNED_MODEL="maxi")
    assert "absent" in _refusal(MILONGA_MODEL=f"file:{tmp_path}/absent")
    assert "sha256" in _refusal(MILONGA_MODEL=f"file:{folder}#sha256:{'0' * 64}")


def test_a_taken_port_is_refused_at_start(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        assert listen in _refusal(MILONGA_MODEL=f"file:{folder}", MILONGA_LISTEN=listen)


def test_settings_that_do_not_fit_together_are_refused_at_start(folder: Path) -> None:
    assert "batch_shapes" in _refusal(MILONGA_MODEL=f"file:{folder}", MILONGA_BATCH_SHAPES="1,2")
    with pytest.raises(InvalidInputError, match="batch_shapes"):
        load_settings(GenerationSettings, model="mini", batch_shapes=(4, 2))


@pytest.mark.parametrize("content", [None, "", " \n", "two words", "ünicode", "two\nlines"])
def test_a_token_that_is_none_is_refused_at_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInputError) as caught:
        run(SERVICE, load_settings(GenerationSettings, model="mini", operator_token_file=path))
    assert [fault.field for fault in caught.value.violations] == ["operator_token_file"]


def test_without_a_pin_the_unpinned_model_is_served_and_an_operator_switches_it(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("of-the-file\n")
    settings = {"MILONGA_MODEL": "", "MILONGA_UNPINNED_MODEL": f"file:{folder}"}
    settings |= {"MILONGA_OPERATOR_TOKEN": "not-this", "MILONGA_OPERATOR_TOKEN_FILE": f"{tmp_path}/token"}
    other = tmp_path / "other"
    tiny_pipeline(seed=1).save_pretrained(other)
    with _service(**settings) as (process, ready, lines):
        assert ready["model"] == "tiny"
        with AudioClient(f"127.0.0.1:{ready['port']}", retries=0) as client:
            with pytest.raises(UnauthenticatedError):
                client.switch_model(f"file:{other}", token="not-this")
            assert client.switch_model(f"file:{other}", token="of-the-file").current.name == "other"
            with pytest.raises(ModelNotFoundError):
                client.switch_model("file:/absent", token="of-the-file")
            assert client.generate("a dog barks").model.name == "other"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    log = "".join(lines)
    assert "of-the-file" not in log and "not-this" not in log
    story = [event["event"] for event in map(json.loads, lines) if event["event"] != "call"]
    assert story[:2] == ["settings", "ready"]
    assert set(story[2:]) == {"switched", "unloaded", "switch refused", "draining", "stopped"}
