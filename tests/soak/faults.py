"""What a fault of the schedule does to a service, and how the service comes back."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Final

from tests.programs import environment
from tests.services.runtime.fault_prompts import BREAK, HANG
from tests.soak.callers import STUDIO
from tests.soak.ledger import Window
from tests.soak.load import Load
from tests.soak.mix import Mix
from tests.soak.processes import SoakService
from tests.soak.schedule import RESTARTING, Event, Fault
from tests.soak.toxiproxy import Toxiproxy
from tests.soak.vanishing import READY

LIMIT_SECONDS: Final = 30.0
"""Settings `max_turn_seconds` and `max_batch_run_seconds`: after it a call of the model counts as hung."""
GRACE_SECONDS: Final = 30.0
"""Setting `grace_seconds`."""
_END_SECONDS: Final = 180.0
"""For a process to end, on a machine that is busy."""
_EXIT_CODES: Final = {Fault.KILL: -signal.SIGKILL, Fault.DRAIN: 0, Fault.HANG: 1, Fault.BREAK: 1}


class Faults:
    """Carries out the events of a schedule. Belongs to one event loop."""

    def __init__(
        self, services: Mapping[str, SoakService], load: Load, mix: Mix, proxies: Toxiproxy | None
    ) -> None:
        self._services, self._load, self._mix, self._proxies = services, load, mix, proxies
        self._busy: set[str] = set()
        """Services that a fault is done to."""
        self.windows: list[Window] = []
        self.endings: list[str] = []
        self.wrong: list[str] = []

    async def run(self, event: Event) -> None:
        """Carry out one event; nothing, if another is under way at this service."""
        if event.service in self._busy:
            return
        self._busy.add(event.service)
        start = time.monotonic()
        try:
            if event.fault in RESTARTING:
                await self._restart(event)
            elif event.fault is Fault.STOP:
                await self._stop(event)
            elif event.fault is Fault.VANISH:
                await self._vanish(event)
            elif self._proxies is not None:
                await self._poison(event, self._proxies)
        except (OSError, RuntimeError, TimeoutError) as error:
            self.wrong.append(f"{event}: {error!r}")
        finally:
            self._busy.discard(event.service)
            self.windows.append(
                Window(fault=event.fault, service=event.service, start=start, end=time.monotonic())
            )

    async def revive(self) -> None:
        """Start each service again that has ended without a fault, and note that something is wrong."""
        for service in self._services.values():
            code = service.current.process.poll()
            if code is None or service.name in self._busy:
                continue
            self._busy.add(service.name)
            one, start = service.current, time.monotonic()
            one.ending = "by itself"
            self.wrong.append(
                f"{one.name}-{one.number} ended by itself, exit code {code}: {one.last_words()}"
            )
            try:
                await asyncio.to_thread(service.end)
                service.start()
                await asyncio.to_thread(service.wait_until_serving)
            finally:
                self._busy.discard(service.name)
                window = Window(fault=Fault.KILL, service=service.name, start=start, end=time.monotonic())
                self.windows.append(window)

    async def _restart(self, event: Event) -> None:
        service, fault = self._services[event.service], event.fault
        incarnation, start = service.current, time.monotonic()
        await asyncio.to_thread(incarnation.sample)
        incarnation.ending = str(fault)
        asked: asyncio.Task[None] | None = None
        if fault is Fault.KILL:
            service.send(signal.SIGKILL)
        elif fault is Fault.DRAIN:
            service.send(signal.SIGTERM)
        else:
            prompt = HANG if fault is Fault.HANG else BREAK
            asked = asyncio.create_task(self._ask(service, prompt))
        code = await asyncio.to_thread(service.wait, _END_SECONDS)
        seconds = time.monotonic() - start
        name = f"{incarnation.name}-{incarnation.number}"
        self.endings.append(f"{name}, {fault}: exit code {code} after {seconds:.1f} s")
        if code != _EXIT_CODES[fault]:
            self.wrong.append(f"{name}, {fault}: exit code {code}, not {_EXIT_CODES[fault]}")
        await asyncio.to_thread(service.end)
        service.start()
        await asyncio.to_thread(service.wait_until_serving)
        if asked is not None:
            await asked

    async def _ask(self, service: SoakService, prompt: str) -> None:
        """Send a faulty prompt until the process has ended: the first may be refused, or be alone."""
        process = service.current.process
        while process.poll() is None:
            await self._load.make(self._mix.prompt(service.name, prompt))
            await asyncio.sleep(1.0)

    async def _stop(self, event: Event) -> None:
        service = self._services[event.service]
        service.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(event.seconds)
        finally:
            service.send(signal.SIGCONT)

    async def _vanish(self, event: Event) -> None:
        """Kill a client process that has open calls."""
        target = self._services[event.service].target
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.soak.vanishing", target, event.service, STUDIO.token or ""),
            stdout=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), _END_SECONDS)
            if line.decode().strip() != READY:
                self.wrong.append(f"the vanishing client of {event.service} did not begin")
            await asyncio.sleep(min(event.seconds, 2.0))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _poison(self, event: Event, proxies: Toxiproxy) -> None:
        await asyncio.to_thread(proxies.poison, event.service, event.fault)
        try:
            await asyncio.sleep(event.seconds)
        finally:
            await asyncio.to_thread(proxies.heal, event.service, event.fault)
