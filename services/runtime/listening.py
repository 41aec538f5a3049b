"""Sockets of HTTP servers."""

import socket


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """Return a TCP socket that listens; an empty host means every interface. Raises `OSError`."""
    family, _, _, _, address = socket.getaddrinfo(
        host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    # With create_server, asyncio leaves Nagle's algorithm on: it looks at the stated protocol. Then a
    # short response takes 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener
