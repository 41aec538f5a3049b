"""Services as processes that are killed and started again, and what is seen of them from outside (Linux)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from services.processes import free_port
from tests.programs import environment

START_SECONDS: Final = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the system says of a process at one moment."""

    at: float
    """On the clock of `time.monotonic`."""
    rss: int
    """Bytes."""
    threads: int
    descriptors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The line of one call in a service's log."""

    request_id: str
    rpc: str
    code: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauges:
    """One answer of the metrics port."""

    counts: Mapping[tuple[str, str], int]
    """Calls that ended, by rpc and code."""
    left: Mapping[str, float]
    """What is in progress or in a queue, by metric; only what is not 0."""


_LEFT: Final = (
    "milonga_requests_in_flight",
    "milonga_queue_depth",
    "milonga_running",
    "milonga_scoring_queue_seconds",
    "milonga_reward_queue_seconds",
    "milonga_captioning_queue_seconds",
    "milonga_explanation_queue_depth",
)


_ASKED: Final = re.compile(
    "CUDA error: an illegal|CUDA out of memory|NotFiniteError|fails at every request|have all failed|hangs"
    "|has not ended within|the model's thread does not end"
    "|ExecuteBatchError"  # gRPC's own, for an answer to a caller who is gone
)


class Incarnation:
    """One process of a service, from its start to its end."""

    def __init__(self, name: str, number: int, log: Path, settings: Mapping[str, str]) -> None:
        """Start it."""
        self.name, self.number, self.log = name, number, log
        self.started = time.monotonic()
        self.samples: list[Sample] = []
        self.gauges = Gauges(counts={}, left={})
        """The last that were read."""
        self.ending = ""
        """The fault that is to end it."""
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.faulty", name],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(**settings),
            )
        self._metrics = f"http://127.0.0.1:{settings['MILONGA_METRICS_PORT']}/metrics"

    def sample(self) -> None:
        """Read what the system says, and the metrics, unless the process has ended or is stopped."""
        with suppress(OSError, KeyError):  # a process that ends loses its memory first
            folder = Path(f"/proc/{self.process.pid}")
            text = (folder / "status").read_text()
            status = dict(line.split(":", 1) for line in text.splitlines())
            if status["State"].split()[0] in "TZX":
                return
            sample = Sample(
                at=time.monotonic(),
                rss=int(status["VmRSS"].split()[0]) * 1024,
                threads=int(status["Threads"]),
                descriptors=len(list((folder / "fd").iterdir())),
            )
            self.gauges = self.read_gauges()
            self.samples.append(sample)

    def read_gauges(self) -> Gauges:
        """Ask the metrics port. Raises `OSError` if it does not answer."""
        with urllib.request.urlopen(self._metrics, timeout=5) as response:
            text = response.read().decode()
        counts: dict[tuple[str, str], int] = {}
        left: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "milonga_requests_total":
                    counts[sample.labels["rpc"], sample.labels["code"]] = int(sample.value)
                elif sample.name in _LEFT:
                    left[sample.name] = left.get(sample.name, 0.0) + sample.value
        return Gauges(counts=counts, left={name: value for name, value in left.items() if value})

    def last_words(self) -> str:
        """Return the last line of its log."""
        return (self.log.read_text(errors="replace").splitlines() or ["nothing"])[-1][:300]

    def faults(self) -> Counter[str]:
        """Return the errors in its log that are none that callers asked its model for."""
        found: Counter[str] = Counter()
        for event in self.events():
            if event.get("level") in ("error", "critical"):
                causes = [f"{one['exc_type']}: {one['exc_value']}" for one in event.get("exception", [])]
                text = f"{event.get('event')}: {causes[0] if causes else event.get('reason', '')}"
                if not _ASKED.search(text):
                    found[text[:200]] += 1
        return found

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of its log."""
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith('{"'):
                with suppress(ValueError):  # cut by SIGKILL
                    yield json.loads(line)


@dataclass(kw_only=True)
class SoakService:
    """A service at a fixed address, in one process after another."""

    name: str
    settings: Mapping[str, str]
    folder: Path
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    incarnations: list[Incarnation] = field(default_factory=list)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def current(self) -> Incarnation:
        return self.incarnations[-1]

    def start(self) -> None:
        """Start the next process."""
        number = len(self.incarnations)
        self.incarnations.append(
            Incarnation(
                self.name,
                number,
                self.folder / f"{self.name}-{number}.log",
                {
                    **self.settings,
                    "MILONGA_LISTEN": self.target,
                    "MILONGA_METRICS_PORT": str(self.metrics_port),
                },
            )
        )

    def is_serving(self) -> bool:
        """Return whether its health service answers SERVING."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.target, options=options) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            with suppress(grpc.RpcError):
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    def wait_until_serving(self) -> None:
        """Raise `RuntimeError` if the process ends or does not serve in time."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.current.process.poll() is None:
            if self.is_serving():
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} does not serve; its log: {self.current.log}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.current.process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Return the exit code; None if the process does not end in time."""
        try:
            return self.current.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """End the process, if there is one, whatever it does."""
        if not self.incarnations:
            return
        if self.current.process.poll() is None:
            self.current.process.kill()
        self.current.process.wait()
        assert self.current.process.stdin is not None
        self.current.process.stdin.close()
