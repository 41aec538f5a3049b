"""The health service: which services are SERVING, told to whoever asks and to whoever watches.

gRPC's own for asyncio keeps one condition a service name and drops it when any of its watchers leaves: the
others would never hear that the server drains. Clients that choose among replicas by health are watchers.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_Status = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health`. Belongs to one event loop; several servers may share it."""

    def __init__(self) -> None:
        self._statuses: dict[str, Any] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def is_serving(self, name: str) -> bool:
        """Whether `name` is SERVING."""
        return bool(self._statuses.get(name) == _Status.SERVING)

    def serve(self, names: Iterable[str]) -> None:
        """Be SERVING under each of `names`."""
        self._change(dict.fromkeys(names, _Status.SERVING))

    def drain(self) -> None:
        """Be NOT_SERVING from now on."""
        self._change(dict.fromkeys(self._statuses, _Status.NOT_SERVING))

    def close(self) -> None:
        """End every watch: a server that stops would wait for them as for other calls."""
        self._closed = True
        self._change({})

    def _change(self, statuses: dict[str, Any]) -> None:
        self._statuses |= statuses
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> _Status:
        """See grpc's health.proto."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service is called {request.service[:200]!r}")
        return _Status(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """See grpc's health.proto."""
        told: int | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != told:
                await context.write(_Status(status=status))
                told = status
            if self._closed:
                return
            await changed.wait()
