"""The gRPC health service (grpc.health.v1.Health), with a Watch that serves any number of watchers.

grpcio's own asyncio servicer keeps one condition variable per service name and drops it when any watcher
leaves, so that the others are not notified when the server drains. Clients that balance by health use Watch.
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
    """`grpc.health.v1.Health`. Belongs to one event loop; several servers may share one instance."""

    def __init__(self) -> None:
        self._statuses: dict[str, Any] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def is_serving(self, name: str) -> bool:
        """Return whether the service `name` is SERVING."""
        return bool(self._statuses.get(name) == _Status.SERVING)

    def serve(self, names: Iterable[str]) -> None:
        """Set the status of each service of `names` to SERVING."""
        self._change(dict.fromkeys(names, _Status.SERVING))

    def drain(self) -> None:
        """Set the status of every service to NOT_SERVING."""
        self._change(dict.fromkeys(self._statuses, _Status.NOT_SERVING))

    def close(self) -> None:
        """End every Watch call: a stopping server waits for its calls."""
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
        sent: int | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
            if self._closed:
                return
            await changed.wait()
