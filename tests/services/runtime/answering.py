"""A real server whose messages are bytes: unary rpcs, and a stream."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from services.runtime.callers import Caller, current_caller
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import ServerSettings, load_settings

GENERATE = "/milonga.v1.GenerationService/GenerateAudio"
GET_MODEL = "/milonga.v1.GenerationService/GetModel"
STREAM = "/milonga.v1.GenerationService/StreamGenerateAudio"
SWITCH = "/milonga.v1.OperatorService/SwitchModel"
UNLISTED = "/milonga.v1.GenerationService/NotInTheTable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    server: Server
    metrics: ServerMetrics
    channel: grpc.aio.Channel
    callers: list[Caller] = field(default_factory=list)
    """The caller of each call that reached the servicer."""

    async def call(
        self, method: str = GENERATE, token: str | None = None, message: bytes = b"x", **metadata: str
    ) -> Any:
        """Call an rpc; return its answer, or raise `grpc.aio.AioRpcError`."""
        pairs = [(key.replace("_", "-"), value) for key, value in metadata.items()]
        pairs += [] if token is None else [("authorization", f"Bearer {token}")]
        rpc: Any = self.channel.unary_unary(method)
        return await rpc(message, metadata=pairs, timeout=30)

    async def code(self, *arguments: Any, **options: Any) -> grpc.StatusCode:
        """Call an rpc; return the code of its status."""
        try:
            await self.call(*arguments, **options)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def count(self, method: str, code: str) -> None:
        """Wait until a call is counted with a code, which is when its status is on its way."""
        labels = {"rpc": method.rpartition("/")[2], "code": code}
        async with asyncio.timeout(60):
            while not self.metrics.registry.get_sample_value("milonga_requests_total", labels):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def answering(
    *, operator_token: str | None = None, credentials: Any = None, seconds: float = 0.0, **settings: Any
) -> AsyncIterator[Answering]:
    """Serve the methods above on a real server, with a channel to it. Each call takes `seconds`."""
    metrics = ServerMetrics()
    server = Server(load_settings(ServerSettings, **settings), metrics)
    if operator_token is not None:
        server.access.allow_operator(operator_token)
    callers: list[Caller] = []

    async def answer(request: bytes, context: object) -> bytes:
        callers.append(current_caller())
        await asyncio.sleep(seconds)
        return request

    async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
        yield await answer(request, context)

    handler: Any = grpc.unary_unary_rpc_method_handler(answer)
    for name in ("GenerationService", "OperatorService"):
        rpcs = dict.fromkeys(("GenerateAudio", "GetModel", "SwitchModel", "NotInTheTable"), handler)
        rpcs["StreamGenerateAudio"] = grpc.unary_stream_rpc_method_handler(stream)
        generic = grpc.method_handlers_generic_handler(f"milonga.v1.{name}", rpcs)
        server.add(f"milonga.v1.{name}", lambda to, generic=generic: to.add_generic_rpc_handlers((generic,)))  # type: ignore[misc]
    await server.start()
    target = settings.get("listen", "").replace("0.0.0.0:0", "") or f"127.0.0.1:{server.port}"
    try:
        channel = (
            grpc.aio.insecure_channel(target)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials)
        )
        async with channel:
            yield Answering(server=server, metrics=metrics, channel=channel, callers=callers)
    finally:
        await server.stop(0)
