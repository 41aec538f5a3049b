"""The HTTP server that Prometheus scrapes: one thread, few connections, each with a time limit.

prometheus_client's own server starts a thread per connection, and waits for a silent one for ever.
"""

import asyncio
import http.client
import io
import socket
import threading
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from services.errors import invalid
from services.runtime.listening import listen

log = structlog.get_logger()

MAX_CONNECTIONS: Final = 128
"""Connections at a time. One more closes the oldest, which has had time to be served."""

CONNECTION_SECONDS: Final = 10.0
"""Time from the start of a connection to the end of its response."""

MAX_HEAD_BYTES: Final = 16_384
"""Maximum size of the head of a request."""

_FAULTS = (
    TimeoutError,
    ConnectionError,
    asyncio.IncompleteReadError,
    asyncio.LimitOverrunError,
)
"""What a connection ends with that is silent, reset, or sends too much."""


class MetricsServer:
    """Serves the metrics of a registry until `stop`, one request per connection."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Bind ``host:port`` and start the thread.

        Raises:
            InvalidInputError: the port is in use, or the host is not an address of this machine.
        """
        self._app: Any = make_wsgi_app(registry)
        self._connections: dict[asyncio.StreamWriter, None] = {}
        """Open connections, the oldest first."""
        self._socket = _bind(host, port)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close every connection and free the port."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._answer, sock=self._socket, limit=MAX_HEAD_BYTES)
        await self._stopping.wait()
        server.close()
        for writer in tuple(self._connections):
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.transport.abort()
        self._connections[writer] = None
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                writer.write(self._respond(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except _FAULTS:
            pass
        finally:
            self._connections.pop(writer, None)
            writer.transport.abort()

    def _respond(self, head: bytes) -> bytes:
        """Return the response to a request, from the bytes of its head."""
        lines: list[str] = []

        def start(status: str, headers: list[tuple[str, str]]) -> None:
            lines.append(f"HTTP/1.1 {status}")
            lines.extend(f"{name}: {value}" for name, value in headers)

        try:
            body = b"".join(self._app(_environment(head), start))
        except (ValueError, http.client.HTTPException):
            lines, body = ["HTTP/1.1 400 Bad Request"], b""
        except Exception:
            log.exception("metrics can't be collected")
            lines, body = ["HTTP/1.1 500 Internal Server Error"], b""
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        return "\r\n".join(lines).encode("latin-1") + body


def _environment(head: bytes) -> dict[str, str]:
    """Return the WSGI environment of a request. Raises `ValueError` or `HTTPException` if it is not HTTP."""
    line, _, rest = head.partition(b"\r\n")
    method, target, _ = line.decode("latin-1").split(" ")
    headers = http.client.parse_headers(io.BytesIO(rest))
    path, _, query = target.partition("?")
    variables = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    return {**variables, "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}


def _bind(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port, MAX_CONNECTIONS)
    except OSError as error:
        raise invalid("metrics_port", f"can't listen on {host}:{port}: {error.strerror or error}") from error
