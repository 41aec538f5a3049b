"""Server reflection that also resolves the full names of methods."""

from collections.abc import Sequence
from typing import Any, cast

import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection


def add_reflection(names: Sequence[str], server: grpc.aio.Server) -> None:
    """Add the reflection service, which lists the services `names` and itself, to a server."""
    pool = cast("descriptor_pool.DescriptorPool", _MethodPool(descriptor_pool.Default()))
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server, pool=pool)


class _MethodPool:
    """A descriptor pool that resolves a method's full name to its file.

    protobuf 6's pool finds messages, fields, enums and services, but no methods. ghz looks up methods, and
    does not work without them.
    """

    def __init__(self, pool: descriptor_pool.DescriptorPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """Return the file that defines `symbol`. Raises `KeyError` for an unknown symbol."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            parent, _, name = symbol.rpartition(".")
            method = self._pool.FindServiceByName(parent).methods_by_name[name]
            return method.containing_service.file
