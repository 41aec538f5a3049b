"""Local ports that lead to pods, as `kubectl port-forward` makes them, for a promoter outside the cluster."""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

_CHUNK = 2**16


class Forwarding:
    """A port on the loopback interface that forwards to one pod. A context manager, or closed by `close`."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        """`connect` opens a socket to the pod, once for each connection to the port."""
        self._connect = connect
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        """HOST:PORT of the local port."""
        self.error: Exception | None = None
        """Why the last connection to the pod failed; None if it did not."""
        self._closed = False
        self._open: set[Any] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="forwarding", daemon=True).start()

    def close(self) -> None:
        """Close the port and all its connections."""
        self._closed = True
        self._server.close()
        with self._lock:
            for one in self._open:
                _shut(one)

    def __enter__(self) -> "Forwarding":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), name="forwarding", daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        try:
            far = self._connect()
        except Exception as error:  # any: the client sees a closed connection
            self.error = error
            _shut(near)
            return
        self.error = None
        with self._lock:
            self._open |= {near, far}
        back = threading.Thread(target=_pump, args=(far, near), name="forwarding", daemon=True)
        back.start()
        _pump(near, far)
        back.join()
        with self._lock:
            self._open -= {near, far}


def _pump(source: Any, sink: Any) -> None:
    """Copy bytes until either side closes, then close both."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    _shut(source)
    _shut(sink)


def _shut(one: Any) -> None:
    for end in (lambda: one.shutdown(socket.SHUT_RDWR), one.close):
        with contextlib.suppress(OSError):
            end()
