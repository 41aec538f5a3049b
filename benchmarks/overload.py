"""What services do under more load than they can carry, and generation to one caller next to a greedy one.

    python -m benchmarks.overload [--seconds 60] [--services generation scoring reward captioning]
        [--output FILE]

It starts each service on one thread, so that the clients have a core of their own, with callers by token.
The caller who makes a thousand calls a second is a process of its own, of lower priority, since it would be
elsewhere.
Measured, as ratios in one run:

* of generation, a caller's calls, one after another, alone and next to each kind of greedy caller, and the
  calls that end well next to a caller who makes a thousand calls a second;
* at three times the rate that the device can carry, with and without deadlines: the calls that end well per
  second, over those of callers who never stop (the capacity), and the processor time of the service for each.

Calls of scoring, reward and captioning have one clip, and are serialized before: the client needs little of
its core.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import grpc.aio
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import PROMPT, RATE, cpu_seconds, machine, noise_clips, service_plan, write_report
from milonga.v1 import audio_pb2, captioning_pb2, generation_pb2, reward_pb2, scoring_pb2
from services.catalogue import CAPTIONING, GENERATION, REWARD, SCORING
from services.client import AsyncAudioClient
from services.errors import MilongaError
from services.processes import running
from services.runtime.tokens import new_token, token_digest

CALLERS: Final = ("caller", "greedy", "others")
CAPACITY_CALLS: Final = 16
"""Calls at once that measure the capacity: two full batches."""
DEADLINE: Final = 7.0
"""Deadline of a call under overload, in unloaded times; a second at least."""
OVERLOAD: Final = 3.0
HAMMER_RATE: Final = 1_000.0
"""Calls a second of a caller who does not wait, each with a timeout of `HAMMER_TIMEOUT` seconds."""
HAMMER_TIMEOUT: Final = 30.0

PARTS: Final = ("overload", "hammered", "greedy")

Work = Callable[[float], Awaitable["Call"]]
"""Makes a call with a timeout in seconds."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How many calls ended well."""

    good: float
    """A second."""
    cpu: float
    """Seconds of the service's processor time for each."""
    errors: Counter[str]


async def capacity(work: Work, pid: int, seconds: float) -> Rate:
    """Return the rate of callers who never stop."""
    async with repeating(lambda: work(600.0), CAPACITY_CALLS) as done:
        await asyncio.sleep(seconds / 4)
        done.clear()
        start, cpu = time.monotonic(), cpu_seconds(pid)
        await asyncio.sleep(seconds)
        good, span = sum(one.error is None for one in done), time.monotonic() - start
        errors = Counter(one.error for one in done if one.error is not None)
        return Rate(good=good / span, cpu=(cpu_seconds(pid) - cpu) / max(1, good), errors=errors)


async def overload(work: Work, pid: int, rate: float, seconds: float, timeout: float) -> Rate:
    """Call at random times; return the rate. A quarter at most is warm-up."""
    calls: list[tuple[float, Call]] = []
    start, cpu = time.monotonic(), 0.0
    warm = min(seconds / 4, timeout)

    async def one() -> None:
        done = await work(timeout)
        calls.append((time.monotonic() - start, done))

    tasks = []
    due = 0.0
    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        tasks.append(asyncio.create_task(one()))
        due += random.expovariate(rate)
        cpu = cpu or (cpu_seconds(pid) if due >= warm else 0.0)
    good = sum(done.error is None and warm <= ended for ended, done in calls)
    span, used = time.monotonic() - start - warm, cpu_seconds(pid) - cpu
    errors = Counter(done.error for _, done in calls if done.error is not None)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Rate(good=good / span, cpu=used / max(1, good), errors=errors)


async def overloads(work: Work, pid: int, seconds: float) -> dict[str, Any]:
    """Return the report of three times the load, with and without deadlines."""
    report = {}
    alone = [await work(600.0) for _ in range(12)]
    unloaded = median(one.seconds for one in alone[4:])
    for name, timeout in (("with deadlines", max(1.0, DEADLINE * unloaded)), ("without deadlines", 3600.0)):
        most = await capacity(work, pid, seconds / 2)
        found = await overload(work, pid, OVERLOAD * most.good, seconds, timeout)
        report[name] = {
            "unloaded": round(unloaded, 3),
            "capacity": round(most.good, 3),
            "goodput": round(found.good / most.good, 3),
            "cpu_seconds_of_a_good_call": {"capacity": round(most.cpu, 4), "overload": round(found.cpu, 4)},
            "errors": dict(found.errors),
        }
        print(name, report[name], flush=True)
    return report


async def next_to_greedy(clients: dict[str, AsyncAudioClient], calls: int) -> dict[str, Any]:
    """Return the report of a caller next to each kind of greedy one."""
    caller, greedy, _ = (clients[name] for name in CALLERS)
    await one_after_another(caller, 4)
    report: dict[str, Any] = {}
    for name, (count, options) in GREEDY.items():
        alone = await one_after_another(caller, max(4, calls // 4))
        client = clients["batch"] if "batch" in name else greedy
        async with repeating(partial(call, client, **options), count):
            await asyncio.sleep(3 * median(alone))
            busy = sorted(await one_after_another(caller, calls))
        report[name] = {
            "alone": round(median(alone), 3),
            "median": round(median(busy) / median(alone), 2),
            "longest": round(busy[-1] / median(alone), 2),
        }
        print(name, report[name], flush=True)
        await asyncio.sleep(2)
    return report


async def hammered(work: Work, address: str, service: str, token: str, seconds: float) -> dict[str, Any]:
    """Return the share of calls that end well next to a caller who makes `HAMMER_RATE` calls a second.

    Measured in turns with and without, since other programs use the machine too. Clips that the loud caller
    is given count as well.
    """
    good: Counter[bool] = Counter()
    counts: Counter[str] = Counter()
    span = seconds / 8
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=os.nice, initargs=(10,)) as other:
        await loop.run_in_executor(other, hammer, address, service, token, 0.0, 0.0)  # start it
        async with repeating(lambda: work(600.0), CAPACITY_CALLS) as done:
            for loud in (False, True) * 3:
                counting = None
                if loud:
                    counting = loop.run_in_executor(other, hammer, address, service, token, span / 3, span)
                await asyncio.sleep(span / 3)
                done.clear()
                await asyncio.sleep(span)
                good[loud] += sum(one.error is None for one in done)
                if counting is not None:
                    counts += await counting
    report = {
        "share": round((good[True] + counts["OK"]) / max(1, good[False]), 3),
        "of_it_the_loud_caller's": round(counts["OK"] / max(1, good[False]), 3),
        "made_a_second": round(counts["made"] / 3 / span),
        "refused_a_second": round(counts["RESOURCE_EXHAUSTED"] / 3 / span),
    }
    print("a thousand calls a second", report, flush=True)
    return report


def hammer(address: str, service: str, token: str, warm: float, seconds: float) -> Counter[str]:
    """Make `HAMMER_RATE` calls a second without waiting; count those made, and codes, after `warm` seconds.

    A program of its own.
    """
    return asyncio.run(_hammer(address, service, token, warm, seconds))


async def _hammer(address: str, service: str, token: str, warm: float, seconds: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        work = raw_call(channel, *message_of(service), token)

        async def one() -> None:
            counts[(await work(HAMMER_TIMEOUT)).error or "OK"] += 1

        start, tasks = time.monotonic(), set()
        for number in range(round(HAMMER_RATE * (warm + seconds))):
            if number == round(HAMMER_RATE * warm):
                counts.clear()
            await asyncio.sleep(max(0.0, start + number / HAMMER_RATE - time.monotonic()))
            if time.monotonic() - start > warm + seconds:
                break  # the processor is busy
            counts["made"] += 1
            tasks.add(task := asyncio.create_task(one()))
            task.add_done_callback(tasks.discard)
        found = counts.copy()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


def raw_call(channel: grpc.aio.Channel, method: str, message: bytes, token: str) -> Work:
    """Return a function that calls an rpc with a message that is serialized already."""
    rpc: Any = channel.unary_unary(method)
    metadata = (("authorization", f"Bearer {token}"),)

    async def work(timeout: float) -> Call:
        start, error = time.monotonic(), None
        try:
            await rpc(message, metadata=metadata, timeout=timeout)
        except grpc.aio.AioRpcError as raised:
            error = raised.code().name
        return Call(seconds=time.monotonic() - start, error=error)

    return work


def message_of(service: str) -> tuple[str, bytes]:
    """Return an rpc and a request for one clip."""
    (waveform,) = noise_clips(1)
    clip = audio_pb2.Clip(
        audio=waveform.tobytes(), encoding=audio_pb2.AUDIO_ENCODING_FLOAT32, sample_rate_hertz=RATE
    )
    pairs = [audio_pb2.PromptedClip(prompt=PROMPT, clip=clip)]
    method, request = {
        GENERATION.name: (
            "GenerationService/GenerateAudio",
            generation_pb2.GenerateAudioRequest(prompt=PROMPT),
        ),
        SCORING.name: ("ScoringService/BatchScoreAudio", scoring_pb2.BatchScoreAudioRequest(pairs=pairs)),
        REWARD.name: (
            "RewardService/BatchComputeRewards",
            reward_pb2.BatchComputeRewardsRequest(pairs=pairs),
        ),
        CAPTIONING.name: (
            "CaptioningService/CaptionAudio",
            captioning_pb2.CaptionAudioRequest(clips=[clip], beams=[2]),
        ),
    }[service]
    return f"/milonga.v1.{method}", request.SerializeToString()


MODELS: Final = {
    GENERATION.name: ("--model", "mini"),
    SCORING.name: ("--scorer", "clap-a=mini:clap-a"),
    REWARD.name: ("--model", "mini"),
    CAPTIONING.name: ("--model", "mini"),
}


async def measure(
    service: str,
    address: str,
    pid: int,
    tokens: dict[str, str],
    seconds: float,
    calls: int,
    parts: Sequence[str],
) -> dict[str, Any]:
    """Return the report of a service."""
    report: dict[str, Any] = {}
    connections = (("grpc.use_local_subchannel_pool", 1),)  # one each
    async with grpc.aio.insecure_channel(address, connections) as channel:
        others = raw_call(channel, *message_of(service), tokens["others"])
        if "overload" in parts:
            report["overload"] = await overloads(others, pid, seconds)
        if "hammered" in parts:
            report["hammered"] = await hammered(others, address, service, tokens["greedy"], seconds)
    if service != GENERATION.name or "greedy" not in parts:
        return report
    clients = {name: AsyncAudioClient(address, token=token, retries=0) for name, token in tokens.items()}
    clients["batch"] = AsyncAudioClient(address, token=tokens["greedy"], retries=0, priority="batch")
    try:
        report["next_to_greedy"] = await next_to_greedy(clients, calls)
    finally:
        for client in clients.values():
            await client.close()
    return report


def main() -> None:
    """Measure, print tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--services", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each overload")
    parser.add_argument("--calls", type=int, default=20, help="next to each greedy caller")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=Path("build/bench/overload.json"))
    arguments = parser.parse_args()
    tokens = {name: new_token() for name in CALLERS}
    report: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "services": {}}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "callers.toml"
        file.write_text(
            "".join(
                f'[callers.{name}]\ntokens = ["{token_digest(token)}"]\n' for name, token in tokens.items()
            )
        )
        for name in arguments.services:
            plan = service_plan(name, *MODELS[name], "--threads", "1", "--callers-file", str(file))
            with running([plan], logs=Path(folder)) as (service,):
                service.wait_until_serving()
                pid, seconds = service.process.pid, arguments.seconds
                found = asyncio.run(
                    measure(name, plan.address, pid, tokens, seconds, arguments.calls, arguments.parts)
                )
            report["services"][name] = found
    write_report(arguments.output, report)
    _print(report["services"])


def _print(services: dict[str, Any]) -> None:
    table = Table("next to a greedy caller", "alone, s", "median", "longest")
    for name, row in services.get(GENERATION.name, {}).get("next_to_greedy", {}).items():
        table.add_row(name, f"{row['alone']:.2f}", f"{row['median']:.2f} ×", f"{row['longest']:.2f} ×")
    Console().print(table)
    table = Table("three times the load", "capacity, calls/s", "goodput", "errors")
    for service, report in services.items():
        for name, row in report.get("overload", {}).items():
            errors = json.dumps(row["errors"])
            table.add_row(f"{service} {name}", f"{row['capacity']:.2f}", f"{row['goodput']:.0%}", errors)
    Console().print(table)


if __name__ == "__main__":
    main()
