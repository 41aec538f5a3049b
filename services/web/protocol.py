"""HTTP/1.1 by uvicorn, with limits on the time that a client may take to send a head, and to read on."""

import asyncio
import socket
import struct
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PromptProtocol(H11Protocol):
    """A connection that is closed if no whole head of a request arrives in time, or nothing is read."""

    head_seconds = 30.0
    """Time from the start of a connection, or from the first byte of a later head."""
    send_seconds = 60.0
    """Time in which the client must read something, while more is to be sent than buffers hold."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._start()

    def data_received(self, data: bytes) -> None:
        """Read on; stop the clock when the head is there."""
        super().data_received(data)
        cycle: Any = self.cycle  # None before the first request
        if cycle is not None and not cycle.response_complete:
            self._stop()
        elif self._deadline is None:
            self._start()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Write on."""
        self._stop_watching()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop()
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self, size: int) -> None:
        self._unread = self.loop.call_later(self.send_seconds, self._check, size)

    def _check(self, before: int) -> None:
        """Disconnect a client that has read nothing since `before` bytes were to be sent."""
        now = self.transport.get_write_buffer_size()
        if now < before:
            self._watch(now)
            return
        # Otherwise the system keeps the connection, and what lies in its buffers.
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _start(self) -> None:
        self._deadline = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
