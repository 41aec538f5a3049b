"""Who makes a call: peers, and the context variable."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from services.runtime.callers import Caller, Priority, calling, current_caller, peer_host
from services.runtime.interceptors import PRIORITY_KEY
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import ServerSettings, load_settings

METHOD = "/milonga.v1.Test/Call"


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:49952", "ipv4:10.0.0.7"),
        ("ipv6:%5B::1%5D:60296", "ipv6:::/64"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:60296", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:60296", "ipv6:fe80::/64"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:60296", "ipv4:10.0.0.7"),
        ("unix:", "unix"),
        ("unix:/run/milonga.sock", "unix"),
        ("unix-abstract:milonga", "unix-abstract"),
        ("ipv4:rubbish", "ipv4"),
        ("", "local"),
    ],
)
def test_a_peer_is_its_host(peer: str, host: str) -> None:
    assert peer_host(peer) == host


def test_key_is_the_name_otherwise_the_peer() -> None:
    assert Caller(name="studio", peer="ipv4:10.0.0.7").key == "studio"
    assert Caller(peer="ipv4:10.0.0.7").key == "ipv4:10.0.0.7"


async def test_tasks_and_threads_inherit_the_caller_and_others_do_not() -> None:
    async def name() -> str:
        await asyncio.sleep(0)
        return await asyncio.to_thread(lambda: current_caller().name)

    def start(caller: str) -> asyncio.Task[str]:
        with calling(Caller(name=caller)):
            return asyncio.create_task(name())

    names = list(await asyncio.gather(start("one"), start("two"), name()))
    assert names == ["one", "two", ""]


@asynccontextmanager
async def answering(call: Callable[[bytes, object], Awaitable[bytes]]) -> AsyncIterator[Any]:
    """Serve one unary rpc on a real server; yield a call of it."""
    server = Server(load_settings(ServerSettings), ServerMetrics())
    handler = grpc.method_handlers_generic_handler(
        "milonga.v1.Test", {"Call": grpc.unary_unary_rpc_method_handler(call)}
    )
    server.add("milonga.v1.Test", lambda to: to.add_generic_rpc_handlers((handler,)))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel.unary_unary(METHOD)
    finally:
        await server.stop(0)


class _Who:
    """Records the caller of each rpc."""

    def __init__(self) -> None:
        self.seen: list[Caller] = []

    async def call(self, request: bytes, context: object) -> bytes:
        self.seen.append(current_caller())
        return request


@pytest.mark.parametrize(
    ("word", "priority"), [(None, "interactive"), ("batch", "batch"), ("interactive",) * 2]
)
async def test_a_call_has_its_peer_and_the_priority_of_its_metadata(
    word: str | None, priority: Priority
) -> None:
    who = _Who()
    async with answering(who.call) as rpc:
        await rpc(b"x", metadata=((PRIORITY_KEY, word),) if word else ())
    assert who.seen == [Caller(peer="ipv4:127.0.0.1", priority=priority)]


async def test_an_unknown_priority_is_refused() -> None:
    async with answering(_Who().call) as rpc:
        with pytest.raises(grpc.aio.AioRpcError, match="is 'urgent', must be interactive or batch") as caught:
            await rpc(b"x", metadata=((PRIORITY_KEY, "urgent"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
