"""What a generation service does under more load than it can carry, and to one caller next to a greedy one.

    python -m benchmarks.overload [--seconds 60] [--model mini] [--output build/bench/overload.json]

It starts a service on one thread, so that the clients have a core of their own, with three callers by token.
Measured, as ratios in one run:

* a caller's calls, one after another, alone and next to each kind of greedy caller;
* at three times the rate that the device can carry, with and without deadlines: the calls that end well per
  second, over those of callers who never stop (the capacity).
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import PROMPT, machine, service_plan, write_report
from services.client import AsyncAudioClient
from services.errors import MilongaError
from services.processes import running
from services.runtime.tokens import new_token, token_digest

CALLERS: Final = ("caller", "greedy", "others")
CAPACITY_CALLS: Final = 16
"""Calls at once that measure the capacity: two full batches."""
DEADLINE: Final = 7.0
"""Deadline of a call under overload, in unloaded times."""
OVERLOAD: Final = 3.0

GREEDY: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "32 calls at once": (32, {}),
    "32 calls at once of batch work": (32, {}),
    "8 calls of 200 steps": (8, {"num_inference_steps": 200}),
    "1 call of 8 clips × 1000 steps": (1, {"num_inference_steps": 1000, "clip_count": 8}),
    "4 streams with a preview at every step": (4, {"preview_interval_steps": 1}),
}
"""Calls at once of the greedy caller, and their options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How a call ended."""

    seconds: float
    error: str | None = None


async def call(client: AsyncAudioClient, timeout: float = 600.0, **options: Any) -> Call:
    """Generate a clip of a random seed."""
    start = time.monotonic()
    error = None
    try:
        if options.get("preview_interval_steps"):
            async for _ in client.stream(PROMPT, seed=random.getrandbits(32), timeout=timeout, **options):
                pass
        else:
            await client.generate(PROMPT, seed=random.getrandbits(32), timeout=timeout, **options)
    except MilongaError as raised:
        error = type(raised).__name__
    return Call(seconds=time.monotonic() - start, error=error)


@asynccontextmanager
async def repeating(work: Callable[[], Awaitable[Any]], count: int) -> AsyncIterator[list[Any]]:
    """Repeat `work` in `count` tasks within the context; yield its results."""
    results: list[Any] = []

    async def again() -> None:
        while True:
            results.append(await work())

    tasks = [asyncio.create_task(again()) for _ in range(count)]
    try:
        yield results
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def one_after_another(client: AsyncAudioClient, count: int) -> list[float]:
    """Return the times of calls with a pause of up to half a second between them."""
    found = []
    for _ in range(count):
        done = await call(client)
        assert done.error is None, done
        found.append(done.seconds)
        await asyncio.sleep(random.random() / 2)
    return found


async def capacity(client: AsyncAudioClient, seconds: float) -> float:
    """Return the calls per second of callers who never stop."""
    async with repeating(lambda: call(client), CAPACITY_CALLS) as done:
        await asyncio.sleep(seconds / 4)
        before, start = len(done), time.monotonic()
        await asyncio.sleep(seconds)
        return (len(done) - before) / (time.monotonic() - start)


async def overload(
    client: AsyncAudioClient, rate: float, seconds: float, timeout: float
) -> tuple[float, Counter[str]]:
    """Call at random times; return the good calls per second and the errors. A quarter at most is warm-up."""
    calls: list[tuple[float, Call]] = []
    start = time.monotonic()
    warm = min(seconds / 4, timeout)

    async def one() -> None:
        done = await call(client, timeout)
        calls.append((time.monotonic() - start, done))

    tasks = []
    due = 0.0
    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        tasks.append(asyncio.create_task(one()))
        due += random.expovariate(rate)
    good = sum(done.error is None and warm <= ended for ended, done in calls)
    span = time.monotonic() - start - warm
    errors = Counter(done.error for _, done in calls if done.error is not None)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return good / span, errors


async def measure(clients: dict[str, AsyncAudioClient], seconds: float, calls: int) -> dict[str, Any]:
    """Return the report."""
    caller, greedy, others = (clients[name] for name in CALLERS)
    await one_after_another(caller, 4)
    report: dict[str, Any] = {"next_to_greedy": {}, "overload": {}}
    for name, (count, options) in GREEDY.items():
        alone = await one_after_another(caller, max(4, calls // 4))
        client = clients["batch"] if "batch" in name else greedy
        async with repeating(partial(call, client, **options), count):
            await asyncio.sleep(3 * median(alone))
            busy = sorted(await one_after_another(caller, calls))
        report["next_to_greedy"][name] = {
            "alone": round(median(alone), 3),
            "median": round(median(busy) / median(alone), 2),
            "longest": round(busy[-1] / median(alone), 2),
        }
        print(name, report["next_to_greedy"][name], flush=True)
        await asyncio.sleep(2)
    unloaded = median(await one_after_another(caller, 4))
    for name, timeout in (("with deadlines", DEADLINE * unloaded), ("without deadlines", 3600.0)):
        most = await capacity(others, seconds / 2)
        good, errors = await overload(others, OVERLOAD * most, seconds, timeout)
        report["overload"][name] = {
            "unloaded": round(unloaded, 3),
            "capacity": round(most, 3),
            "goodput": round(good / most, 3),
            "errors": dict(errors),
        }
        print(name, report["overload"][name], flush=True)
    return report


def main() -> None:
    """Measure, print tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each overload")
    parser.add_argument("--calls", type=int, default=20, help="next to each greedy caller")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--output", type=Path, default=Path("build/bench/overload.json"))
    arguments = parser.parse_args()
    tokens = {name: new_token() for name in CALLERS}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "callers.toml"
        file.write_text(
            "".join(
                f'[callers.{name}]\ntokens = ["{token_digest(token)}"]\n' for name, token in tokens.items()
            )
        )
        plan = service_plan(
            "generation", "--model", arguments.model, "--threads", "1", "--callers-file", str(file)
        )
        with running([plan], logs=Path(folder)) as (service,):
            service.wait_until_serving()
            report = asyncio.run(_measure(plan.address, tokens, arguments.seconds, arguments.calls))
    report |= {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "model": arguments.model}
    write_report(arguments.output, report)
    _print(report)


async def _measure(address: str, tokens: dict[str, str], seconds: float, calls: int) -> dict[str, Any]:
    clients = {name: AsyncAudioClient(address, token=token, retries=0) for name, token in tokens.items()}
    clients["batch"] = AsyncAudioClient(address, token=tokens["greedy"], retries=0, priority="batch")
    try:
        return await measure(clients, seconds, calls)
    finally:
        for client in clients.values():
            await client.close()


def _print(report: dict[str, Any]) -> None:
    table = Table("next to a greedy caller", "alone, s", "median", "longest")
    for name, row in report["next_to_greedy"].items():
        table.add_row(name, f"{row['alone']:.2f}", f"{row['median']:.2f} ×", f"{row['longest']:.2f} ×")
    Console().print(table)
    table = Table("three times the load", "capacity, calls/s", "goodput", "errors")
    for name, row in report["overload"].items():
        table.add_row(name, f"{row['capacity']:.2f}", f"{row['goodput']:.0%}", json.dumps(row["errors"]))
    Console().print(table)


if __name__ == "__main__":
    main()
