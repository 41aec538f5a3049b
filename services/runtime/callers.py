"""Who makes the current call: name, roles, peer and priority. `services.runtime.interceptors` sets it.

Servicers read `current_caller()`: its `key` for fair queueing, its `priority`, and `charge` for its quota.
"""

import ipaddress
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal
from urllib.parse import unquote

from services.fairness import Priority as Priority

Role = Literal["caller", "batch", "operator", "observer"]

PRIORITY_KEY: Final = "x-milonga-priority"
"""Key of the metadata with the priority class of a call: ``interactive`` (the default) or ``batch``."""
NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Pattern of a caller's name."""
LOCAL: Final = "local"
"""Peer of a call within the process."""


def _no_quota(units: float) -> None:
    """Charge nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The caller of one call."""

    name: str = ""
    """Name in the file of callers; empty for an anonymous caller."""
    peer: str = LOCAL
    """Host that the call comes from, without its port: see `peer_host`."""
    roles: frozenset[Role] = frozenset({"caller"})
    """Roles; `services.runtime.roles` has the methods that each may call."""
    priority: Priority = "interactive"
    """Priority class of the call."""
    deadline: float | None = field(default=None, compare=False)
    """Deadline of the call on the clock of `time.monotonic`; None without one."""
    charge: Callable[[float], None] = field(default=_no_quota, repr=False, compare=False)
    """Charge work units to the caller's quota, before the work. Raises `QuotaExceededError`.

    Work units of a generation are clips × denoising steps × seconds of each clip; of scoring, rewards and
    captions the seconds of sound.
    """

    @property
    def key(self) -> str:
        """Whose share of the device the call uses: the name, otherwise the peer. A name holds no colon."""
        return self.name or self.peer


_OURSELVES: Final = Caller()
_current: ContextVar[Caller] = ContextVar("caller", default=_OURSELVES)


def current_caller() -> Caller:
    """Return the caller of the current call; outside a call, an anonymous one within the process.

    Tasks and threads inherit it if they copy the context, as asyncio and `OffLoop` do.
    """
    return _current.get()


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Make `caller` the current one within the context."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)


@lru_cache(maxsize=1024)
def peer_host(peer: str) -> str:
    """Return the host of gRPC's name of a peer: ``ipv4:ADDRESS``, ``ipv6:NETWORK/64``, or ``unix``.

    An IPv6 host has a whole network of addresses, so that network is its name. Connections of a Unix socket
    can't be told apart.
    """
    scheme, _, rest = unquote(peer).partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return scheme or LOCAL
    try:
        address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return scheme
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return f"ipv6:{ipaddress.ip_network((address, 64), strict=False)}"
        address = address.ipv4_mapped
    return f"ipv4:{address}"
