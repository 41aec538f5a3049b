"""Services in processes of their own: started, watched and stopped together.

    address = f"127.0.0.1:{free_port()}"
    plan = ServicePlan(name="generation", arguments=("--model", "mini"), address=address)
    with running([plan], logs=Path("build")) as (generation,):
        generation.wait_until_serving()
        …                                         # AudioClient(generation.target)

A process stops when the context ends, and also when the process that started it ends in any other way.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.errors import OutputError, ServiceUnavailableError

START_SECONDS: Final = 180.0
"""How long a service may take to load its model."""

STOP_SECONDS: Final = 60.0
"""How long one may take to stop, before it is stopped by force: twice the grace it gives calls by default."""

_TAIL_LINES: Final = 20
_POLL_SECONDS: Final = 0.1
_PORTS: Final = range(15_000, 30_000)
"""Below what Linux, macOS and Windows give to outgoing connections, and below Kubernetes' node ports."""
_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
_CHANNEL_OPTIONS: Final = (
    # A service that has just bound its port should be noticed at once, and never by way of a proxy.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServicePlan:
    """A service that is to run."""

    name: str
    """The sub-command of `milonga serve`: ``generation``."""
    arguments: tuple[str, ...]
    """Its flags, but ``--listen``."""
    address: str
    """host:port to listen on."""


class ServiceProcess:
    """A service in a process and a session of its own: Ctrl-C at the terminal reaches its parent alone."""

    def __init__(
        self, plan: ServicePlan, log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            plan: which service.
            log: file that its log goes to; None: standard error, each line after the service's name.
            environment: of the process; None: this one's.

        Raises:
            OutputError: the log can't be written.
        """
        self.plan = plan
        self.ready_seconds: float | None = None
        """How long it took until it was SERVING; None before."""
        host, _, port = plan.address.rpartition(":")
        self.target = f"{_WILDCARDS.get(host, host)}:{port}"
        """Where this machine reaches it."""
        self._log = log
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._channel: grpc.Channel | None = None
        self._start = time.monotonic()
        with contextlib.ExitStack() as closing:
            sink = sys.stderr if log is None else closing.enter_context(_open_log(log))
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "services.cli.leashed", "serve", plan.name, *plan.arguments),
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
                # Who reads our standard error may be gone; a pipe left unread would stop the service.
                with contextlib.suppress(OSError, ValueError):
                    sink.write(prefix + line)
                    sink.flush()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def is_serving(self, timeout: float = 0.2) -> bool:
        """Whether its health service says SERVING, within `timeout` seconds."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.target, options=_CHANNEL_OPTIONS)
        stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its stubs know no rpc
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError:
            return False
        serving: bool = answer.status == health_pb2.HealthCheckResponse.SERVING
        if serving and self.ready_seconds is None:
            self.ready_seconds = time.monotonic() - self._start
        return serving

    def wait_until_serving(self, seconds: float = START_SECONDS) -> None:
        """Return when its health service says SERVING.

        Raises:
            ServiceUnavailableError: it ended, or is not ready in time; with the end of its log.
        """
        while self.running and time.monotonic() - self._start < seconds:
            if self.is_serving():
                return
            time.sleep(_POLL_SECONDS)
        raise ServiceUnavailableError(self.obituary())

    def obituary(self) -> str:
        """One line that says how it ended, and the end of its log."""
        code = self.process.poll()
        if code is None:
            story = "did not come up in time"
        else:
            self._reader.join(_POLL_SECONDS * 10)
            story = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended by itself with exit code {code}"
            )
        lines = [line for line in self._tail if line]
        # A refusal is one clear line of its own; of anything else the end must do.
        refusals = [line for line in lines if line.startswith("error: ")]
        tail = refusals[-1].removeprefix("error: ") if refusals else " | ".join(lines[-3:])
        place = "" if self._log is None else f" (log: {self._log})"
        return f"the {self.plan.name} service {story}{place}: {tail or 'it wrote no log'}"

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there; SIGKILL takes its whole session."""
        if not self.running:
            return
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def close(self) -> None:
        """Free what stands around the process, which has ended."""
        self.process.wait()
        self._reader.join()
        if self._channel is not None:
            self._channel.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def running(
    plans: Sequence[ServicePlan],
    *,
    logs: Path | None = None,
    environment: Mapping[str, str] | None = None,
    hurry: Callable[[], bool] = lambda: False,
) -> Iterator[list[ServiceProcess]]:
    """Run services for the time of the context, started side by side and stopped as by `stop`.

    `logs` is an existing folder for ``NAME.log`` of each; the rest is as for `ServiceProcess` and `stop`.
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
    """Stop services as Kubernetes would: SIGTERM, time to drain, and by force only after `seconds`.

    As soon as `hurry` is true they are stopped by force at once. None is left, whatever is raised meanwhile.
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
    """A port of the loopback that nobody listens on, the first of `consecutive` such ports.

    Not one that the system gives to outgoing connections: one of those, ours that asks for the service's
    health above all, could take it before the service listens.
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
