import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.inference.triton.alive import find_fault


class _Live(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/live" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Live) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _process(processes: Path, number: int, *words: str) -> None:
    (processes / str(number)).mkdir(parents=True)
    (processes / str(number) / "cmdline").write_bytes(b"\0".join(word.encode() for word in words))


def test_every_model_needs_a_process(address: str, tmp_path: Path) -> None:
    _process(tmp_path, 1, "tritonserver", "--model-repository=/triton_python_backend_stub")
    stub = "/opt/tritonserver/backends/python/triton_python_backend_stub"
    _process(tmp_path, 20, stub, "/repository/tango/1/model.py")
    assert find_fault(2, address, tmp_path) == "1 model processes are running, expected at least 2"
    _process(tmp_path, 21, stub, "/repository/clap/1/model.py")
    assert find_fault(2, address, tmp_path) == ""


def test_a_server_that_does_not_answer_is_dead(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
    assert f"Triton does not answer at {address}" in find_fault(0, address, tmp_path)
