"""The program `tests.services.runtime.faulty` as a process, with its log and a channel to it."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from milonga.v1 import audio_pb2
from milonga.v1 import reward_pb2 as pb
from milonga.v1 import reward_pb2_grpc as rpc
from tests.programs import environment
from tests.services.reward.serving import float32, tone
from tests.waiting import LIMIT, until


def request(*prompts: str) -> pb.BatchComputeRewardsRequest:
    """A pair for each prompt, each clip of a second."""
    clip = float32(tone(1.0))
    return pb.BatchComputeRewardsRequest(
        pairs=[audio_pb2.PromptedClip(prompt=prompt, clip=clip) for prompt in prompts]
    )


def error_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Wait for the end of a call. Returns its code and message."""
    error = call.exception(timeout=LIMIT)
    if error is None:
        return grpc.StatusCode.OK, ""
    assert isinstance(error, grpc.Call)
    return error.code(), error.details() or ""


@dataclass(kw_only=True, slots=True)
class Program:
    process: "subprocess.Popen[str]"
    log: list[str] = field(default_factory=list)
    """Lines of its standard error that were read."""
    ready: dict[str, Any] = field(default_factory=dict)
    """The event `ready` of its log, with its ports."""

    def read_until(self, event: str) -> dict[str, Any]:
        """Read its log until an event. Returns the event."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if line.startswith('{"') and json.loads(line)["event"] == event:
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(f"no {event!r} in {self.log}")

    def wait(self) -> tuple[int, Sequence[str]]:
        """Wait for the end of the process. Returns its exit code, and all lines of its standard error."""
        _, rest = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, [*self.log, *rest.splitlines()]

    @contextmanager
    def channel(self, credentials: grpc.ChannelCredentials | None = None) -> Iterator[grpc.Channel]:
        """Connect to it."""
        address = f"localhost:{self.ready['port']}"
        if credentials is None:
            with grpc.insecure_channel(address) as channel:
                yield channel
        else:
            # Else channels with equal credentials share a connection.
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.secure_channel(address, credentials, options) as channel:
                yield channel


def score(channel: grpc.Channel, *prompts: str) -> Any:
    """Start a call; return its future."""
    return rpc.RewardServiceStub(channel).BatchComputeRewards.future(request(*prompts), timeout=LIMIT)


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthWatch:
    call: Any
    statuses: list[Any] = field(default_factory=list)

    def read(self) -> None:
        """Read statuses until the call ends."""
        with contextlib.suppress(grpc.RpcError):
            for response in self.call:
                self.statuses.append(response.status)


def watch_health(channel: grpc.Channel) -> HealthWatch:
    """Watch the service's health, on a thread: the last status is lost if nobody waits for it."""
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no rpc
    watch = HealthWatch(call=stub.Watch(health_pb2.HealthCheckRequest(service="milonga.v1.RewardService")))
    threading.Thread(target=watch.read, daemon=True).start()
    until(lambda: len(watch.statuses) == 1)
    return watch


@contextmanager
def program(*arguments: str, **settings: str) -> Iterator[Program]:
    """Start the program and wait until it serves."""
    values = {"MILONGA_LISTEN": "127.0.0.1:0", "MILONGA_MODEL": "mini", **settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.services.runtime.faulty", *arguments],
        env=environment(**values),
        stderr=subprocess.PIPE,
        text=True,
    )
    started = Program(process=process)
    try:
        started.ready = started.read_until("ready")
        yield started
    finally:
        process.kill()
        process.communicate()
