"""Run services as child processes: start them, wait until they serve, stop them.

    address = f"127.0.0.1:{free_port()}"
    plan = ServicePlan(name="generation", arguments=("--model", "mini"), address=address)
    with running([plan], logs=Path("build")) as (generation,):
        generation.wait_until_serving()
        …                                         # AudioClient(generation.target)

A service stops when the context ends, and also when the parent process ends in any way.
"""

import contextlib
import http
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.errors import OutputError, ServiceUnavailableError

START_SECONDS: Final = 180.0
"""Time that a service may take to load its model."""

STOP_SECONDS: Final = 60.0
"""Time from SIGTERM to SIGKILL: twice the default of `grace_seconds`."""

_TAIL_LINES: Final = 20
_POLL_SECONDS: Final = 0.1
_PORTS: Final = range(15_000, 30_000)
"""Ports below the ephemeral ranges of Linux, macOS and Windows, and below Kubernetes' node ports."""
_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_CHANNEL_OPTIONS: Final = (
    # Notice a service as soon as it has bound its port, and don't use a proxy.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServicePlan:
    """A service to run, with its options and address."""

    name: str
    """The sub-command of `milonga serve`: ``generation``."""
    arguments: tuple[str, ...]
    """Its options, without ``--listen``."""
    address: str
    """host:port to listen on."""
    http: bool = False
    """Whether it speaks HTTP, as the web door does, and says at ``/live`` that it serves."""


class ServiceProcess:
    """A service in a child process with its own session, so that Ctrl-C reaches only the parent."""

    def __init__(
        self, plan: ServicePlan, log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process.

        Args:
            plan: which service to run.
            log: file for its log; None: standard error, each line prefixed with the service's name.
            environment: environment of the process; None: that of this process.

        Raises:
            OutputError: the log file can't be written.
        """
        self.plan = plan
        self.ready_seconds: float | None = None
        """Seconds from the start until `is_serving` was first true; None before."""
        self.target = local_target(plan.address)
        """Address at which this machine reaches the service."""
        self._log = log
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._channel: grpc.Channel | None = None
        self._start = time.monotonic()
        with contextlib.ExitStack() as closing:
            sink = sys.stderr if log is None else closing.enter_context(_open_log(log))
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "services.cli.child", "serve", plan.name, *plan.arguments),
                    *("--listen", plan.address),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env=None if environment is None else dict(environment),
            )
            prefix = f"{plan.name}: " if log is None else ""
            self._reader = threading.Thread(
                target=self._read_log, args=(sink, prefix, closing.pop_all()), daemon=True
            )
        self._reader.start()

    def _read_log(self, sink: TextIO, prefix: str, closing: contextlib.ExitStack) -> None:
        assert self.process.stdout is not None
        with closing:
            for line in self.process.stdout:
                self._tail.append(line.rstrip())
                # Our standard error may be closed; keep reading, since a full pipe would block the service.
                with contextlib.suppress(OSError, ValueError):
                    sink.write(prefix + line)
                    sink.flush()

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def is_serving(self, timeout: float = 0.2) -> bool:
        """Return whether it says within `timeout` seconds that it is serving."""
        serving = self._is_live(timeout) if self.plan.http else self._is_healthy(timeout)
        if serving and self.ready_seconds is None:
            self.ready_seconds = time.monotonic() - self._start
        return serving

    def _is_live(self, timeout: float) -> bool:
        try:
            with _OPENER.open(f"http://{self.target}/live", timeout=timeout) as response:
                return bool(response.status == http.HTTPStatus.OK)
        except (OSError, http.client.HTTPException):
            return False

    def _is_healthy(self, timeout: float) -> bool:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.target, options=_CHANNEL_OPTIONS)
        stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its type stubs declare no rpcs
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_until_serving(self, seconds: float = START_SECONDS) -> None:
        """Block until its health service responds SERVING.

        Raises:
            ServiceUnavailableError: the process ended, or was not ready within `seconds`; the message has the
                end of its log.
        """
        while self.running and time.monotonic() - self._start < seconds:
            if self.is_serving():
                return
            time.sleep(_POLL_SECONDS)
        raise ServiceUnavailableError(self.exit_summary())

    def exit_summary(self) -> str:
        """Return one line: how the process ended (or that it was not ready in time), and its log's end."""
        code = self.process.poll()
        if code is None:
            outcome = "was not ready in time"
        else:
            self._reader.join(_POLL_SECONDS * 10)
            outcome = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended by itself with exit code {code}"
            )
        lines = [line for line in self._tail if line]
        # The command's own error line, if there is one; otherwise the last lines.
        errors = [line for line in lines if line.startswith("error: ")]
        tail = errors[-1].removeprefix("error: ") if errors else " | ".join(lines[-3:])
        log = "" if self._log is None else f" (log: {self._log})"
        return f"the {self.plan.name} service {outcome}{log}: {tail or 'it wrote no log'}"

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended. SIGKILL goes to its whole process group."""
        if not self.running:
            return
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def close(self) -> None:
        """Wait for the process to end, then close its pipes, its log and the health channel."""
        self.process.wait()
        self._reader.join()
        if self._channel is not None:
            self._channel.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def local_target(address: str) -> str:
    """Return the address at which this machine reaches a service that listens on `address`."""
    host, _, port = address.rpartition(":")
    return f"{_WILDCARDS.get(host, host)}:{port}"


@contextlib.contextmanager
def running(
    plans: Sequence[ServicePlan],
    *,
    logs: Path | None = None,
    environment: Mapping[str, str] | None = None,
    hurry: Callable[[], bool] = lambda: False,
) -> Iterator[list[ServiceProcess]]:
    """Run services concurrently within the context; at its end `stop` them.

    Args:
        plans: the services.
        logs: existing folder for a ``NAME.log`` per service; None: standard error.
        environment: see `ServiceProcess`.
        hurry: see `stop`.
    """
    services: list[ServiceProcess] = []
    try:
        for plan in plans:
            log = None if logs is None else logs / f"{plan.name}.log"
            services.append(ServiceProcess(plan, log, environment))
        yield services
    finally:
        stop(services, hurry=hurry)


def stop(
    services: Sequence[ServiceProcess],
    *,
    seconds: float = STOP_SECONDS,
    hurry: Callable[[], bool] = lambda: False,
) -> None:
    """Stop services as Kubernetes does: SIGTERM, up to `seconds` to drain, then SIGKILL.

    SIGKILL is sent early once `hurry` returns true, and whatever is raised meanwhile.
    """
    try:
        for service in services:
            service.send(signal.SIGTERM)
        end = time.monotonic() + seconds
        while any(service.running for service in services) and time.monotonic() < end and not hurry():
            time.sleep(_POLL_SECONDS)
    finally:
        for service in services:
            service.send(signal.SIGKILL)
        for service in services:
            service.close()


def free_port(consecutive: int = 1) -> int:
    """Return a free port of the loopback interface, the first of `consecutive` free ports.

    Not an ephemeral port: an outgoing connection, such as our own health check, could take it before the
    service binds it.
    """
    while True:
        first = secrets.choice(_PORTS)
        try:
            for port in range(first, first + consecutive):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first


def _open_log(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}; write elsewhere") from error
