import asyncio
import contextlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from services.errors import InvalidInputError
from services.runtime import scraping
from services.runtime.scraping import MAX_CONNECTIONS, MAX_HEAD_BYTES, MetricsServer


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc()
    server = MetricsServer(registry, "127.0.0.1", 0)
    try:
        yield server
    finally:
        server.stop()


def _scrape(server: MetricsServer, path: str = "/metrics", **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = response.read().decode()
    return text


def _exchange(server: MetricsServer, sent: bytes) -> bytes:
    """Send bytes; return all that comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError), connection.makefile("rb") as stream:
            return stream.read()
    return b""


def test_the_format_is_what_the_scraper_accepts(server: MetricsServer) -> None:
    assert "things_total 1.0" in _scrape(server)
    assert "things_total 1.0" in _scrape(server, "/metrics?name[]=things_total")
    assert "things_total" not in _scrape(server, "/metrics?name[]=others")
    assert _scrape(server, Accept="application/openmetrics-text; version=1.0.0").endswith("# EOF\n")
    zipped = _exchange(server, b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n\r\n")
    head, _, body = zipped.partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head
    assert body.startswith(b"\x1f\x8b")


def test_silent_connections_hold_no_threads_and_a_scrape_is_answered(server: MetricsServer) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for _ in range(3 * MAX_CONNECTIONS)
        ]
        assert "things_total 1.0" in _scrape(server)
        assert threading.active_count() <= before
        # The oldest have made room.
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""


def test_a_slow_connection_ends(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "CONNECTION_SECONDS", 0.1)
    assert _exchange(server, b"GET /metrics HTTP/1.1\r\n") == b""
    assert "things_total 1.0" in _scrape(server)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /metrics HTTP/1.1\r\n" + 200 * b"a: b\r\n" + b"\r\n", b"HTTP/1.1 400"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405"),
        (b"a" * 2 * MAX_HEAD_BYTES, b""),
    ],
)
def test_what_is_no_scrape_is_refused(server: MetricsServer, sent: bytes, answer: bytes) -> None:
    found = _exchange(server, sent)
    assert found.startswith(answer)
    assert bool(found) == bool(answer)
    assert "things_total 1.0" in _scrape(server)


def test_a_metric_that_can_not_be_collected_is_an_error_of_that_scrape() -> None:
    registry = CollectorRegistry()
    gauge = Counter("things", "Things.", registry=registry)
    server = MetricsServer(registry, "127.0.0.1", 0)
    try:
        collect, gauge.collect = gauge.collect, lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        with pytest.raises(urllib.error.HTTPError, match="500"):
            _scrape(server)
        gauge.collect = collect  # type: ignore[method-assign]
        assert "things_total 0.0" in _scrape(server)
    finally:
        server.stop()


def test_the_port_is_free_after_stop_and_a_taken_one_is_refused(server: MetricsServer) -> None:
    with pytest.raises(InvalidInputError, match=rf"metrics_port: can't listen on 127.0.0.1:{server.port}"):
        MetricsServer(CollectorRegistry(), "127.0.0.1", server.port)
    with pytest.raises(InvalidInputError, match="metrics_port"):
        MetricsServer(CollectorRegistry(), "no.such.host.invalid", 0)
    other = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    other.stop()
    again = MetricsServer(CollectorRegistry(), "127.0.0.1", other.port)
    again.stop()


def test_connections_send_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nagle's algorithm would hold the end of a response back for 40 ms."""
    found: list[int] = []
    answer = MetricsServer._answer

    async def seen(self: MetricsServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await answer(self, reader, writer)

    monkeypatch.setattr(MetricsServer, "_answer", seen)
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    try:
        _scrape(server)
    finally:
        server.stop()
    assert found == [1]
