"""The clients of a soak run: many callers at once, and what each of their calls came to."""

import asyncio
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import grpc
import grpc.aio

from milonga.v1 import generation_pb2
from services.catalogue import GENERATION
from tests.soak.mix import Attempt, Mix

STUCK_SECONDS: Final = 120.0
"""Time after which a call without a deadline counts as stuck."""
STUCK: Final = "STUCK"
WORKERS: Final[Mapping[str, int]] = {
    "generation": 14,
    "scoring": 6,
    "reward": 6,
    "captioning": 4,
    "explanation": 3,
}
"""Clients by service, each with one call at a time."""
_PAUSE_SECONDS: Final = 0.5
"""Mean time between two calls of a client."""
_DOWN_SECONDS: Final = 1.0
"""Further pause after a call that the service did not take."""
_CONNECTIONS: Final = 3

_OPTIONS: Final = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call as its client saw it."""

    attempt: Attempt
    request_id: str
    code: str
    details: str
    start: float
    """On the clock of `time.monotonic`."""
    end: float
    left: bool = False
    """Whether the caller cancelled it."""


@dataclass(kw_only=True, slots=True)
class Bits:
    """Digests of clips that must not change, by model and request."""

    known: dict[tuple[str, bytes], str] = field(default_factory=dict)
    compared: int = 0
    different: int = 0

    def compare(self, request: bytes, response: generation_pb2.GenerateAudioResponse) -> None:
        """Compare the clips with the first of the same model and request."""
        digest = hashlib.sha256(b"".join(clip.clip.audio for clip in response.clips)).hexdigest()
        first = self.known.setdefault((response.model.digest, request), digest)
        self.compared += 1
        self.different += first != digest


class Load:
    """Calls the services from many clients until `stop` is set. Belongs to one event loop."""

    def __init__(self, mix: Mix, targets: Mapping[str, str], proxies: Mapping[str, str]) -> None:
        """`targets`, `proxies`: addresses by service; a service without a proxy is called directly."""
        self._mix, self._rng = mix, random.Random(0)
        self._run = f"s{os.getpid()}"
        self._number = 0
        self._direct = {
            name: [_channel(target) for _ in range(_CONNECTIONS)] for name, target in targets.items()
        }
        self._proxied = {name: _channel(target) for name, target in proxies.items()}
        self.calls: list[Call] = []
        self.bits = Bits()
        self.under_way = 0
        self.stop = asyncio.Event()

    async def run(self) -> None:
        """Call until `stop` is set, and wait for the calls under way."""
        workers = (self._work(name) for name, count in WORKERS.items() for _ in range(count))
        await asyncio.gather(*workers)

    async def close(self) -> None:
        """Close the connections."""
        channels = [*self._proxied.values(), *(one for some in self._direct.values() for one in some)]
        await asyncio.gather(*(channel.close() for channel in channels))

    def counts(self) -> Counter[str]:
        """Return the number of calls by code."""
        return Counter(call.code for call in self.calls)

    async def _work(self, service: str) -> None:
        while not self.stop.is_set():
            call, _ = await self.make(self._mix.draw(service))
            with suppress(TimeoutError):
                pause = self._rng.expovariate(1 / _PAUSE_SECONDS)
                pause += _DOWN_SECONDS if call.code == "UNAVAILABLE" else 0.0
                await asyncio.wait_for(self.stop.wait(), pause)

    async def make(self, attempt: Attempt) -> tuple[Call, bytes]:
        """Make one call, and note it. Returns it with the last message of its answer."""
        self._number += 1
        number, start = self._number, time.monotonic()
        request_id = f"{self._run}-{number}"
        self.under_way += 1
        code, details, answer = "OK", "", b""
        call = self._begin(attempt, request_id)
        left = asyncio.Event()
        ending = asyncio.get_running_loop().call_later(
            STUCK_SECONDS if attempt.leaves_after is None else attempt.leaves_after, _leave, call, left
        )
        try:
            answer = await _read(call, attempt)
        except grpc.aio.AioRpcError as error:
            code, details = error.code().name, error.details() or ""
        except asyncio.CancelledError:
            if not left.is_set():
                raise
            code = "CANCELLED" if attempt.leaves_after is not None else STUCK
        finally:
            ending.cancel()
            self.under_way -= 1
        if attempt.repeated and code == "OK":
            response = generation_pb2.GenerateAudioResponse.FromString(answer)
            self.bits.compare(attempt.payload, response)
        made = Call(
            # Without its clips: in an hour, calls send some ten gigabytes.
            attempt=replace(attempt, payload=b""),
            request_id=request_id, code=code, details=details[:200], start=start,
            end=time.monotonic(), left=left.is_set(),
        )  # fmt: skip
        self.calls.append(made)
        return made, answer

    def _begin(self, attempt: Attempt, request_id: str) -> Any:
        channels = self._direct[attempt.service]
        channel: Any = channels[self._number % len(channels)]
        if attempt.proxied:
            channel = self._proxied.get(attempt.service, channel)
        metadata = attempt.caller.metadata(request_id)
        if not attempt.streaming:
            return channel.unary_unary(attempt.method)(
                attempt.payload, timeout=attempt.timeout, metadata=metadata
            )
        # On the wire, a stream of one request is a single request.
        return channel.unary_stream(attempt.method)(
            attempt.payload, timeout=attempt.timeout, metadata=metadata
        )


async def _read(call: Any, attempt: Attempt) -> bytes:
    """Return the last message of an answer."""
    if not attempt.streaming:
        answer: bytes = await call
        return answer
    last, first = b"", True
    while (message := await call.read()) is not grpc.aio.EOF:
        last = message
        if first and attempt.pause:
            await asyncio.sleep(attempt.pause)
        first = False
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )
    return last


def _leave(call: Any, left: asyncio.Event) -> None:
    if not call.done():
        left.set()
        call.cancel()


def _channel(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(target, options=_OPTIONS)


def switch(mix: Mix, number: int) -> Attempt:
    """Return the call that switches to the other of two models."""
    return mix.switch(("mini-base", GENERATION.weights[0].embedded)[number % 2])  # type: ignore[arg-type]
