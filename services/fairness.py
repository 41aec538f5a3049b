"""Fair shares of a device among priority classes, callers and requests.

Start-time fair queueing (Goyal et al., 1996) over a tree of flows, with quanta of work as its packets: the
number of quanta that a flow was given, its round, is its start tag. A caller thus keeps the device for a
quantum, so that a request of usual size runs to its end, and a longer one yields to others in between. Of
flows with equal rounds, those that have not used up a quantum since they became active go first, like the
sparse flows of FQ-CoDel (RFC 8290).
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable
from heapq import heappop, heappush
from typing import Final, Literal, NamedTuple

Priority = Literal["interactive", "batch"]
PRIORITIES: Final[tuple[Priority, ...]] = ("interactive", "batch")
"""Priority classes: at equal rounds, the first goes first."""
WEIGHTS: Final = {"interactive": 8.0, "batch": 1.0}
"""Shares of the device while both classes have work."""

_CALLER_SHARE: Final = 8
"""A caller may hold this many times the free room: one caller up to 8/9 of a queue, two 8/17 each."""

_RETRY_SOONEST, _RETRY_LATEST = 0.1, 600.0
"""Bounds of `retry_after` in seconds."""
_RETRY_JITTER: Final = 0.3
"""Random share that is added to `retry_after`, so that refused callers do not come back at once."""

_MAX_IDLE: Final = 256
"""Idle flows of a parent that are remembered: the rounds of a caller who comes back at once."""

_numbers: Final = itertools.count()


class Account(NamedTuple):
    """Who a request's work is charged to."""

    caller: str = ""
    """Name or address of the caller; empty if there is only one."""
    priority: Priority = "interactive"


ANONYMOUS: Final = Account()
"""A program that has the device to itself."""


class Path(NamedTuple):
    """Place of a request in the tree of flows."""

    priority: Priority
    caller: str
    number: int
    """Of the request, ascending by arrival."""

    @property
    def account(self) -> Account:
        """Who its work is charged to."""
        return Account(self.caller, self.priority)


class Rank(NamedTuple):
    """Precedence of a request: the least goes first."""

    level: tuple[tuple[int, int], ...]
    """Of class, caller and request: the round, and what breaks ties."""
    number: int

    @property
    def exhausted(self) -> bool:
        """Whether its caller has used up a quantum since it became active."""
        return bool(self.level[1][1])


class _Flow:
    """A class, a caller or a request, and its children."""

    __slots__ = (
        "active",
        "busy",
        "children",
        "clock",
        "exhausted",
        "finish",
        "finishes",
        "round",
        "used",
        "weight",
    )

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.round = 0
        self.used = 0.0
        """Share of the quantum that was used in this round."""
        self.exhausted = False
        """Whether it has used up a quantum since it became active."""
        self.active = 0
        """Requests in it that have not ended."""
        self.children: dict[Hashable, _Flow] = {}
        self.finish: float | None = None
        """Time of its parent until which it counts as busy, if it has ended before."""
        self.finishes: list[tuple[float, int, Hashable]] = []
        """Heap of the children's `finish`, each with a number and the name."""
        self.busy = 0.0
        """Weight of the children that are active, or would be if the device were shared evenly."""
        self.clock = 0.0
        """Virtual time of the children: the round that a child without a past starts with."""

    def enter(self, name: Hashable, weight: float = 1.0) -> "_Flow":
        """Count a request in the child `name`, and return the child."""
        child = self.children.setdefault(name, _Flow(weight))
        if not child.active:
            self.busy += child.weight if child.finish is None else 0.0
            child.finish = None
            child.exhausted = False
            if child.round < int(self.clock):
                child.round, child.used = int(self.clock), 0.0
        child.active += 1
        return child

    def leave(self, name: Hashable, *, forget: bool) -> None:
        """Count a request of the child `name` as ended."""
        child = self.children[name]
        child.active -= 1
        if child.active:
            return
        if forget:
            self.busy -= child.weight
            del self.children[name]
            return
        child.finish = child.round + child.used
        heappush(self.finishes, (child.finish, next(_numbers), name))
        self._finish()
        if len(self.children) > 2 * _MAX_IDLE:
            idle = [
                name for name, child in self.children.items() if not child.active and child.finish is None
            ]
            for name in sorted(idle, key=lambda name: self.children[name].round)[:_MAX_IDLE]:
                del self.children[name]

    def charge(self, name: Hashable, quanta: float) -> "_Flow":
        """Charge work to the child `name`, and return the child."""
        child = self.children[name]
        # As in weighted fair queueing, time also passes with the work: flows that come all the time would
        # otherwise start in the present round for ever, and those of the next round never run.
        self.clock = max(self.clock + quanta / self.busy, child.round)
        self._finish()
        child.used += quanta / child.weight
        if child.used >= 1:
            child.round += int(child.used)
            child.used -= int(child.used)
            child.exhausted = True
        return child

    def _finish(self) -> None:
        """Count children that have ended as idle once the clock has passed what they were given."""
        while self.finishes and self.finishes[0][0] <= self.clock:
            finish, _, name = heappop(self.finishes)
            child = self.children.get(name)
            if child is not None and child.finish == finish:
                child.finish = None
                self.busy -= child.weight


class FairShares:
    """Decides whose turn it is. Not thread-safe."""

    def __init__(self) -> None:
        self._root = _Flow()

    def enter(self, path: Path) -> None:
        """Add a request."""
        group = self._root.enter(path.priority, WEIGHTS[path.priority])
        group.enter(path.caller).enter(path.number)

    def leave(self, path: Path) -> None:
        """Remove a request that has ended."""
        group = self._root.children[path.priority]
        group.children[path.caller].leave(path.number, forget=True)
        group.leave(path.caller, forget=False)
        self._root.leave(path.priority, forget=False)

    def charge(self, path: Path, quanta: float) -> None:
        """Charge work, in quanta, to a request, its caller and their class."""
        self._root.charge(path.priority, quanta).charge(path.caller, quanta).charge(path.number, quanta)

    def rank(self, path: Path) -> Rank:
        """Return a request's precedence now."""
        group = self._root.children[path.priority]
        caller = group.children[path.caller]
        request = caller.children[path.number]
        return Rank(
            (
                (group.round, PRIORITIES.index(path.priority)),
                (caller.round, caller.exhausted),
                (request.round, request.exhausted),
            ),
            path.number,
        )


def work_ahead(account: Account, work: float, waiting: Iterable[tuple[Account, float]]) -> float:
    """Estimate the work that is done for others before a new request with `work` ends.

    `waiting` has the account and the remaining work of each request. An earlier request of the same account
    is ahead with as much as the new one has at most, and another caller with as much as they all have.
    """
    own = 0.0
    others: defaultdict[Account, float] = defaultdict(float)
    for other, left in waiting:
        if other == account:
            own += min(left, work)
        else:
            others[other] += left
    mine = own + work
    ahead = own + sum(min(left, mine) for other, left in others.items() if other.priority == account.priority)
    for priority, weight in WEIGHTS.items():
        if priority != account.priority:
            share = (ahead + work) * weight / WEIGHTS[account.priority]
            ahead += min(share, sum(left for other, left in others.items() if other.priority == priority))
    return ahead


def leaves_room(held: float, more: float, free: float) -> bool:
    """Return whether a caller that holds `held` of a queue leaves room for others if it gets `more`.

    The last unit may be taken, so that a queue of one or two units can be used.
    """
    return not held or held + more <= _CALLER_SHARE * (free - more + 1)


def retry_after(seconds: float) -> float:
    """Return the seconds after which a retry is of use, with jitter, from the estimated wait."""
    jitter = 1 + _RETRY_JITTER * random.random()
    return min(max(seconds * jitter, _RETRY_SOONEST), _RETRY_LATEST)
