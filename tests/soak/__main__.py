"""Load every service for a time, with faults at random, and check that everything holds.

    make soak [MINUTES=10] [SEED=N] [TOXIPROXY=/path/to/toxiproxy-server]
    python -m tests.soak [--minutes 10] [--seed N] [--toxiproxy PATH] [--output build/soak]

Generation, scoring and reward run as processes on the embedded models. Clients of several names and
priorities call all of them, with deadlines and without, cancel, read slowly and vanish, and send malformed
and oversized messages. Meanwhile processes are killed, drained, stopped and broken, and so is the network, if
toxiproxy is there (https://github.com/Shopify/toxiproxy). At the end both sides' counts of calls must agree,
nothing may be left in the engines, memory, threads and descriptors must not have grown, and equal requests
must have had equal bits.

Writes report.md, report.json, rss.png and the services' logs. Exit code 1: something did not hold. Ctrl-C
ends the load early, with a report. Which faults happen when depends on the seed alone.
"""

import argparse
import asyncio
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from milonga.v1 import captioning_pb2, explanation_pb2, reward_pb2, scoring_pb2
from services.catalogue import CATALOGUE, EMBEDDED_SCORERS
from tests.soak import report
from tests.soak.callers import write_callers
from tests.soak.faults import GRACE_SECONDS, LIMIT_SECONDS, Faults
from tests.soak.ledger import compare
from tests.soak.load import Load, switch
from tests.soak.mix import MAX_REQUEST_BYTES, SAME, Mix
from tests.soak.processes import SoakService
from tests.soak.report import Outcome
from tests.soak.schedule import Event, schedule
from tests.soak.toxiproxy import Toxiproxy, toxiproxy

_SAMPLE_SECONDS: Final = 1.0
_PROGRESS_SECONDS: Final = 15.0
_SWITCH_SECONDS: Final = 40.0
_TOLERANCE: Final = 1e-4
"""Of scores and rewards: a prompt's embedding, which is cached, depends a little on its batch."""
_QUIET_SECONDS: Final = 90.0
"""For what is in progress to end after the load: a lost client is found within 40 seconds."""


def _settings(callers: Path) -> dict[str, dict[str, str]]:
    """Return the settings of each service, as its environment."""
    common = {
        "MILONGA_CALLERS_FILE": str(callers),
        "MILONGA_MAX_REQUEST_BYTES": str(MAX_REQUEST_BYTES),
        "MILONGA_GRACE_SECONDS": str(GRACE_SECONDS),
    }
    batched = {
        **common,
        "MILONGA_MAX_BATCH_RUN_SECONDS": str(LIMIT_SECONDS),
        "MILONGA_MAX_QUEUE_SECONDS": "120",
    }
    generation = {
        "MILONGA_MODEL": "mini",
        "MILONGA_EXACT": "true",
        "MILONGA_BATCH_SHAPES": "[4]",
        "MILONGA_MAX_QUEUE": "16",
        "MILONGA_MAX_TURN_SECONDS": str(LIMIT_SECONDS),
    }
    scorer = {"clap-a": EMBEDDED_SCORERS["clap-a"]}
    return {
        "generation": {**common, **generation},
        "scoring": {**batched, "MILONGA_SCORERS": str(scorer).replace("'", '"')},
        "reward": {**batched, "MILONGA_MODEL": "mini"},
        "captioning": {**batched, "MILONGA_MODEL": "mini", "MILONGA_CLAP": scorer["clap-a"]},
        "explanation": {**common, "MILONGA_MODEL": "mini", "MILONGA_MAX_RUN_SECONDS": str(LIMIT_SECONDS)},
    }


class Soak:
    """One run. Belongs to the event loop that it is made in."""

    def __init__(
        self,
        seed: int,
        minutes: float,
        services: Mapping[str, SoakService],
        proxies: Toxiproxy | None,
        addresses: Mapping[str, str],
    ) -> None:
        """`addresses`: of the proxies, by service."""
        self._seed, self._minutes = seed, minutes
        self._services, self._proxies = services, proxies
        self._mix = Mix(seed)
        targets = {name: service.target for name, service in services.items()}
        self._load = Load(self._mix, targets, addresses)
        self._faults = Faults(services, self._load, self._mix, proxies)
        self._stop = self._load.stop
        self._start = time.monotonic()

    async def run(self) -> Outcome:
        """Load until the time is over or somebody presses Ctrl-C, then look at what is left."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        for service in self._services.values():
            service.start()
        for service in self._services.values():
            await asyncio.to_thread(service.wait_until_serving)
        answers = await self._ask_alone()
        self._start = time.monotonic()
        events = schedule(
            self._seed, 60 * self._minutes, list(self._services), toxic=self._proxies is not None
        )
        self._say(f"{len(events)} faults are planned")
        loop.call_later(60 * self._minutes, self._stop.set)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._load.run())
            tasks.create_task(self._watch())
            tasks.create_task(self._report_progress())
            tasks.create_task(self._switch())
            for event in events:
                tasks.create_task(self._at(event))
        minutes = (time.monotonic() - self._start) / 60
        self._say("the load has ended; waiting until nothing is in progress")
        left = await self._quiet()
        if not np.allclose(await self._ask_alone(), answers, atol=_TOLERANCE):
            self._faults.wrong.append("scores, rewards, captions or explanations differ from before")
        await self._load.close()
        await self._sample()
        await asyncio.to_thread(self._end)
        return self._outcome(minutes, left)

    def _interrupt(self) -> None:
        self._say("stopping; Ctrl-C once more ends at once, without a report")
        self._stop.set()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    async def _at(self, event: Event) -> None:
        if await self._pause(event.at - (time.monotonic() - self._start)):
            self._say(str(event.fault), event.service)
            await self._faults.run(event)

    async def _pause(self, seconds: float) -> bool:
        """Return after `seconds`, or earlier, with false, if the load ends."""
        try:
            await asyncio.wait_for(self._stop.wait(), max(0.0, seconds))
        except TimeoutError:
            return True
        return False

    async def _ask_alone(self) -> list[float]:
        """Ask for what must be the same at the end, one after the other; return its numbers."""
        for number in range(SAME):
            await self._load.make(self._mix.same(number))
        _, scores = await self._load.make(self._mix.pairs_of_always("scoring"))
        _, rewards = await self._load.make(self._mix.pairs_of_always("reward"))
        _, captions = await self._load.make(self._mix.captions_of_always())
        found = captioning_pb2.CaptionAudioResponse.FromString(captions).captions
        _, explained = await self._load.make(self._mix.explanation_of_always())
        return [
            *explanation_pb2.ExplainAudioResponse.FromString(explained).explanation.values,
            *(candidate.log_probability for one in found for candidate in one.candidates),
            *(one.scores[0] for one in scoring_pb2.BatchScoreAudioResponse.FromString(scores).results),
            *(one.logit for one in reward_pb2.BatchComputeRewardsResponse.FromString(rewards).rewards),
        ]

    async def _switch(self) -> None:
        number = 0
        while await self._pause(_SWITCH_SECONDS):
            await self._load.make(switch(self._mix, number))
            number += 1

    async def _watch(self) -> None:
        while await self._pause(_SAMPLE_SECONDS):
            await self._sample()
            await self._faults.revive()

    async def _sample(self) -> None:
        for service in self._services.values():
            await asyncio.to_thread(service.current.sample)

    async def _report_progress(self) -> None:
        while await self._pause(_PROGRESS_SECONDS):
            codes = ", ".join(f"{code} {count}" for code, count in self._load.counts().most_common())
            memory = ", ".join(
                f"{name}-{one.current.number} {one.current.samples[-1].rss / 2**20:.0f} MiB"
                for name, one in self._services.items()
                if one.current.samples
            )
            self._say(f"{self._load.under_way} calls in progress; ended: {codes}; {memory}")

    def _say(self, text: str, service: str = "") -> None:
        print(
            f"{time.monotonic() - self._start:7.1f} s  {service + ': ' if service else ''}{text}", flush=True
        )

    async def _quiet(self) -> dict[str, Mapping[str, float]]:
        """Wait until nothing is in progress; return what is left by service."""
        end = time.monotonic() + _QUIET_SECONDS
        await self._faults.revive()
        while True:
            gauges = {
                name: await asyncio.to_thread(service.current.read_gauges)
                for name, service in self._services.items()
            }
            left = {name: found.left for name, found in gauges.items()}
            if not any(left.values()) or time.monotonic() > end:
                return left
            await asyncio.sleep(1.0)

    def _end(self) -> None:
        for service in self._services.values():
            service.send(signal.SIGTERM)
        for service in self._services.values():
            code = service.wait(60.0)
            if code != 0:
                self._faults.wrong.append(f"{service.name} ended with exit code {code} after the run")

    def _outcome(self, minutes: float, left: Mapping[str, Mapping[str, float]]) -> Outcome:
        incarnations = [one for service in self._services.values() for one in service.incarnations]
        outcome = Outcome(
            seed=self._seed, minutes=minutes, planned=self._minutes, started=self._start,
            proxy=_describe(self._proxies), calls=self._load.calls, bits=self._load.bits,
            windows=self._faults.windows, incarnations=incarnations, endings=self._faults.endings, left=left,
            ledger=compare(self._load.calls, incarnations, self._faults.windows), faults=self._faults.wrong,
        )  # fmt: skip
        outcome.judge()
        return outcome


def _describe(proxies: Toxiproxy | None) -> str:
    return "not given, so no faults of the network" if proxies is None else proxies.version()


def _run(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.output
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    write_callers(folder / "callers.toml")
    print(f"seed {arguments.seed}; logs: {logs}", flush=True)
    with ExitStack() as closing:
        services = {
            name: SoakService(name=name, settings=settings, folder=logs)
            for name, settings in _settings(folder / "callers.toml").items()
        }
        for service in services.values():
            closing.callback(service.end)
        proxies, addresses = None, {}
        if arguments.toxiproxy is not None:
            proxies = closing.enter_context(toxiproxy(arguments.toxiproxy, logs / "toxiproxy.log"))
            addresses = {name: proxies.add(name, service.target) for name, service in services.items()}

        async def soak() -> Outcome:
            return await Soak(arguments.seed, arguments.minutes, services, proxies, addresses).run()

        outcome = asyncio.run(soak())
        report.write(outcome, folder)
    for fault in outcome.faults[:20]:
        print(f"wrong: {fault}")
    print(f"{len(outcome.calls)} calls, {len(outcome.faults)} faults; see {folder / 'report.md'}")
    return 1 if outcome.faults else 0


def main() -> int:
    """Read the arguments, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the load")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(10**6), help="of the faults and the calls"
    )
    parser.add_argument("--toxiproxy", type=Path, help="program toxiproxy-server, for faults of the network")
    parser.add_argument("--output", type=Path, default=Path("build/soak"))
    arguments = parser.parse_args()
    if left_out := [name for name in CATALOGUE if name not in _settings(Path())]:
        print(f"not in this run: {', '.join(left_out)}", flush=True)
    if arguments.toxiproxy is not None and not arguments.toxiproxy.is_file():
        parser.error(f"--toxiproxy is {arguments.toxiproxy}, which is no file")
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main())
