"""A toxiproxy-server between clients and services, by its HTTP API (https://github.com/Shopify/toxiproxy)."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from services.processes import free_port
from tests.soak.schedule import Fault

_START_SECONDS: Final = 30.0
_TOXICS: Final[Mapping[Fault, Mapping[str, Any]]] = {
    Fault.RESET: {"type": "reset_peer", "attributes": {"timeout": 0}},
    Fault.LATENCY: {"type": "latency", "attributes": {"latency": 300, "jitter": 200}},
    Fault.BANDWIDTH: {"type": "bandwidth", "attributes": {"rate": 20}},
    Fault.PARTITION: {"type": "timeout", "attributes": {"timeout": 0}},
}
"""Milliseconds; kilobytes a second."""


class Toxiproxy:
    """The proxies of a running server."""

    def __init__(self, api: int) -> None:
        self._api = api

    def add(self, name: str, upstream: str) -> str:
        """Return the address of a new proxy of `upstream`."""
        address = f"127.0.0.1:{free_port()}"
        self._send("POST", "/proxies", {"name": name, "listen": address, "upstream": upstream})
        return address

    def poison(self, name: str, fault: Fault) -> None:
        """Begin a fault, in both directions."""
        for stream in ("upstream", "downstream"):
            toxic = {"name": f"{fault.name}-{stream}", "stream": stream, **_TOXICS[fault]}
            self._send("POST", f"/proxies/{name}/toxics", toxic)

    def heal(self, name: str, fault: Fault) -> None:
        """End a fault."""
        for stream in ("upstream", "downstream"):
            self._send("DELETE", f"/proxies/{name}/toxics/{fault.name}-{stream}")

    def version(self) -> str:
        """Return the server's version."""
        answer = self._send("GET", "/version").decode()
        # Some versions answer with the bare number, others with JSON.
        return str(json.loads(answer)["version"]) if answer.startswith("{") else answer.strip()

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self._api}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            content: bytes = response.read()
            return content


@contextmanager
def toxiproxy(program: Path, log: Path) -> Iterator[Toxiproxy]:
    """Run the program until the end of the context. Raises `TimeoutError` if it does not answer."""
    port = free_port()
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [program, "-host", "127.0.0.1", "-port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            proxies = Toxiproxy(port)
            _wait_for(proxies)
            yield proxies
        finally:
            process.terminate()


def _wait_for(proxies: Toxiproxy) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        with suppress(urllib.error.URLError, ConnectionError):
            proxies.version()
            return
        time.sleep(0.05)
    raise TimeoutError("toxiproxy-server does not answer")
