"""Server reflection that also finds methods by their full name."""

from collections.abc import Sequence
from typing import Any, cast

import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection


def add_reflection(names: Sequence[str], server: grpc.aio.Server) -> None:
    """List the services called `names`, and reflection itself, to whoever asks."""
    pool = cast("descriptor_pool.DescriptorPool", _MethodPool(descriptor_pool.Default()))
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server, pool=pool)


class _MethodPool:
    """A descriptor pool in which a method's full name leads to its file.

    protobuf 6's pool finds messages, fields, enums and services, but no method. Clients may ask for
    one: ghz does, and otherwise refuses to load the service.
    """

    def __init__(self, pool: descriptor_pool.DescriptorPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """As the pool's own, for methods too. Raises `KeyError` for what is not there."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            parent, _, name = symbol.rpartition(".")
            method = self._pool.FindServiceByName(parent).methods_by_name[name]
            return method.containing_service.file
