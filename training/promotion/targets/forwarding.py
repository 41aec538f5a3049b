"""Pods as ports of this machine: what `kubectl port-forward` does, for a promoter outside the cluster."""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

_CHUNK = 2**16


class Forwarding:
    """A port of the loopback whose connections go to one pod. Closed, or as a context."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        """`connect` makes a socket to the pod, one for each connection to us."""
        self._connect = connect
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        """Where it listens."""
        self.error: Exception | None = None
        """Why the last connection to the pod did not come about; None if it did."""
        self._closed = False
        self._open: set[Any] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="forwarding", daemon=True).start()

    def close(self) -> None:
        """Stop listening, and break what is connected."""
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
        except Exception as error:  # whatever it is: who called us sees a closed connection
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
    """Pass bytes on until either side ends, then end both."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    _shut(source)
    _shut(sink)


def _shut(one: Any) -> None:
    for end in (lambda: one.shutdown(socket.SHUT_RDWR), one.close):
        with contextlib.suppress(OSError):
            end()
