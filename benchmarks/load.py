"""A client at constant load with its retries off: what a promotion, a drain or a lost pod does to its calls.

    python -m benchmarks.load --target HOST:PORT [--rate 5] [--seconds 60] [--output build/bench/load]
    python -m benchmarks.load            # against a service of its own, which switches models meanwhile
    python -m benchmarks.load --plot build/bench/load                       # the plot of calls made before

Calls start at fixed times, whether the ones before have ended or not. Each is short, and has a deadline.
Every answer names one model, and its clips are compared with the first that this model made of the same seed:
other companions in a batch change a clip inaudibly, other weights wholly, so that a mixed answer shows.

Writes calls.jsonl, one line per call as soon as it has ended, summary.json, and load.png, the calls a second
by model, if matplotlib is installed. Otherwise it needs the light install only. Exit code 1: a call failed,
or was mixed.
"""

import argparse
import asyncio
import json
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from services.client import TLS, AsyncAudioClient, Generation
from services.errors import MilongaError

PROMPTS = ("A dog barks then a siren wails", "A bird sings while rain falls", "A bell tolls")
MOST = 5.0
"""Calls a second, where nothing is said."""
SEEDS = 2
"""Each prompt comes with as many seeds: so often each clip is made again."""
TOLERANCE = 0.1
"""Relative difference up to which two clips are the same; those of other weights differ by about 1."""


_READY_SECONDS = 600.0
"""For a service to start, on a machine that is busy with something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """What is called how often."""

    rate: float = MOST
    """Calls a second."""
    timeout: float = 30.0
    """Deadline of each, in seconds."""
    num_inference_steps: int = 2
    clip_count: int = 1
    duration: float = 0.32
    """Seconds of each clip."""
    channels: int = 1
    """Connections that calls go round: behind one address each may end at another replica."""
    health_check: bool = False
    """As the client's option: leave the addresses that are not SERVING."""
    tls_ca: Path | None = None
    """Authorities in PEM: speak TLS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How one call ended."""

    start: float
    """Seconds since the load began."""
    seconds: float
    """How long it took."""
    code: str
    """gRPC's name of its status."""
    digest: str | None = None
    """Of the model that the answer names."""
    name: str | None = None
    version: str | None = None
    mixed: bool = False
    """Whether its clips are not those of the model that it names."""
    error: str | None = None


@dataclass(kw_only=True, slots=True)
class References:
    """The first clips of each model, prompt and seed."""

    known: dict[tuple[str, str, int], list[NDArray[np.float32]]] = field(default_factory=dict)

    def differs(self, prompt: str, generation: Generation) -> bool:
        """Whether the clips are not those that the named model made of the same request before."""
        clips = [clip.waveform() for clip in generation.clips]
        key = (generation.model.digest, prompt, generation.seed)
        reference = self.known.setdefault(key, clips)
        return any(
            np.linalg.norm(ours_N - theirs_N) > TOLERANCE * np.linalg.norm(theirs_N)
            for ours_N, theirs_N in zip(clips, reference, strict=True)
        )


class Load:
    """Calls a service at a constant rate, in a thread of its own, for the time of the context.

    ::

        with Load("127.0.0.1:50051", LoadPlan(rate=5), output) as load:
            load.wait_for_answers(3)
            load.mark("switch")
            …
        assert load.summary()["failed"] == {}
    """

    def __init__(
        self, target: str, plan: LoadPlan, output: Path | None = None, *, limit: int | None = None
    ) -> None:
        """`output`: folder for `calls.jsonl`. `limit`: calls after which no more are started."""
        self.target, self.plan, self._output, self._limit = target, plan, output, limit
        self.calls: list[Call] = []
        """Those that have ended, in that order."""
        self.marks: list[tuple[float, str]] = []
        """What happened when."""
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._references = References()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> Self:
        if self._output is not None:
            self._output.mkdir(parents=True, exist_ok=True)
            (self._output / "calls.jsonl").write_text("")
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Start no more calls, and wait for those under way."""
        self._stop.set()
        self._thread.join()

    def join(self) -> None:
        """Wait for the end of a load that has a limit."""
        self._thread.join()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._start

    def mark(self, what: str) -> None:
        """Note that something happens now."""
        self.marks.append((self.elapsed, what))

    def wait_for_answers(self, count: int, digest: str | None = None, seconds: float = 120.0) -> None:
        """Return when so many more calls were answered well, by the model with this digest if it is given.

        Raises:
            TimeoutError: they were not, in so many `seconds`.
        """
        first, end = len(self.calls), time.monotonic() + seconds
        while sum(call.code == "OK" and digest in (None, call.digest) for call in self.calls[first:]) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"{count} answers did not come in {seconds:g} s")
            time.sleep(0.02)

    def summary(self) -> dict[str, Any]:
        """What came of it."""
        return {"target": self.target, "plan": asdict(self.plan), **summarize(self.calls, self.marks)}

    async def _run(self) -> None:
        plan = self.plan
        clients = [
            AsyncAudioClient(
                self.target,
                retries=0,
                timeout=plan.timeout,
                health_check=plan.health_check,
                tls=None if plan.tls_ca is None else TLS(ca_file=plan.tls_ca),
                # Otherwise channels of one target share their connections.
                channel_options=[("grpc.use_local_subchannel_pool", 1)],
            )
            for _ in range(plan.channels)
        ]
        calls: set[asyncio.Task[None]] = set()
        number = 0
        try:
            while not self._stop.is_set() and number != self._limit:
                delay = number / plan.rate - self.elapsed
                if delay > 0:
                    await asyncio.sleep(min(delay, 0.1))
                    continue
                task = asyncio.create_task(self._call(clients[number % len(clients)], number))
                calls.add(task)
                task.add_done_callback(calls.discard)
                number += 1
            await asyncio.gather(*calls)
        finally:
            for client in clients:
                await client.close()

    async def _call(self, client: AsyncAudioClient, number: int) -> None:
        plan, start = self.plan, self.elapsed
        prompt, seed = PROMPTS[number % len(PROMPTS)], number // len(PROMPTS) % SEEDS
        try:
            generation = await client.generate(
                prompt,
                seed=seed,
                clip_count=plan.clip_count,
                num_inference_steps=plan.num_inference_steps,
                duration=plan.duration,
                encoding="float32",
            )
        except MilongaError as error:
            cause = error.__cause__
            code = cause.code().name if isinstance(cause, grpc.aio.AioRpcError) else type(error).__name__
            self._note(Call(start=start, seconds=self.elapsed - start, code=code, error=str(error)))
            return
        model = generation.model
        self._note(
            Call(
                start=start,
                seconds=self.elapsed - start,
                code="OK",
                digest=model.digest,
                name=model.name,
                version=model.version,
                mixed=self._references.differs(prompt, generation),
            )
        )

    def _note(self, call: Call) -> None:
        self.calls.append(call)
        if self._output is not None:
            with (self._output / "calls.jsonl").open("a") as file:
                file.write(json.dumps(asdict(call)) + "\n")


def summarize(calls: Sequence[Call], marks: Sequence[tuple[float, str]] = ()) -> dict[str, Any]:
    """Counts and times of calls."""
    answered = [call for call in calls if call.code == "OK"]
    times = [call.seconds for call in answered] or [float("nan")]
    models: dict[str, dict[str, Any]] = {}
    for call in sorted(answered, key=lambda call: call.start):
        model = models.setdefault(
            str(call.digest), {"name": call.name, "version": call.version, "calls": 0, "first": call.start}
        )
        model["calls"] += 1
        model["last"] = call.start
    return {
        "calls": len(calls),
        "answered": len(answered),
        "failed": dict(Counter(call.code for call in calls if call.code != "OK")),
        "mixed": sum(call.mixed for call in calls),
        "models": models,
        "seconds": {
            "median": float(np.median(times)), "p95": float(np.percentile(times, 95)), "max": max(times),
        },
        "marks": [list(mark) for mark in marks],
    }  # fmt: skip


def read_calls(path: Path) -> list[Call]:
    """The calls of a `calls.jsonl`."""
    return [Call(**json.loads(line)) for line in path.read_text().splitlines()]


def plot(calls: Sequence[Call], marks: Sequence[tuple[float, str]], path: Path) -> None:
    """Draw the calls that started in each second, by the model that answered, and those that failed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    end = max((call.start for call in calls), default=0.0)
    width = max(1.0, end / 40)
    length = int(end / width) + 1
    below = np.zeros(length)
    groups: dict[str, list[float]] = {}
    for call in calls:
        label = call.code if call.digest is None else f"{call.name} {call.version} {call.digest[7:15]}"
        groups.setdefault(label, []).append(call.start)
    for label, starts in groups.items():
        counts, edges = np.histogram(starts, bins=length, range=(0.0, length * width))
        failed = label.isupper()
        axes.bar(
            edges[:-1],
            counts / width,
            width=width,
            align="edge",
            bottom=below,
            label=f"failed: {label}" if failed else label,
            color="black" if failed else None,
        )
        below += counts / width
    for moment, what in marks:
        axes.axvline(moment, color="grey", linewidth=0.8)
        axes.annotate(
            what,
            (moment, 0.03),
            xycoords=axes.get_xaxis_transform(),
            rotation=90,
            va="bottom",
            ha="left",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0},
        )
    axes.set(xlabel="seconds", ylabel="calls a second")
    figure.legend(loc="outside upper center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_results(load: Load, output: Path) -> Mapping[str, Any]:
    """Write `summary.json` and, where matplotlib is installed, `load.png` into `output`."""
    summary = load.summary()
    (output / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    if find_spec("matplotlib") is not None:
        plot(load.calls, load.marks, output / "load.png")
    else:
        print(f"no plot, as matplotlib is not installed; elsewhere: --plot {output}", file=sys.stderr)
    return summary


def easy(target: str, plan: LoadPlan) -> LoadPlan:
    """The plan at a rate that leaves the service idle most of the time: what fails then, fails for a reason.

    A third of the calls that it answers one after another now, and at most the plan's own rate.
    """
    for _ in range(2):  # the first one warms up
        with Load(target, replace(plan, rate=1000.0, timeout=600.0), limit=1) as once:
            once.join()
    return replace(plan, rate=min(plan.rate, 1 / 3 / once.calls[0].seconds))


def _demonstrate(plan: LoadPlan, measure: bool, seconds: float, output: Path) -> Load:
    """Load a service of our own that switches from `mini-base` to `mini` and back."""
    import os

    from services.client import AudioClient
    from services.processes import ServicePlan, free_port, running

    token = secrets.token_urlsafe(16)
    service = ServicePlan(
        name="generation", arguments=("--model", "mini-base"), address=f"127.0.0.1:{free_port()}"
    )
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MILONGA_OPERATOR_TOKEN": token, "MILONGA_THREADS": "1"}
    with running([service], logs=output, environment=environment) as (process,):
        process.wait_until_serving(_READY_SECONDS)
        if measure:
            plan = easy(process.target, plan)
        with Load(process.target, plan, output) as load, AudioClient(process.target) as client:
            for model in ("mini", "mini-base"):
                time.sleep(seconds / 3)
                load.mark(f"switch to {model}")
                switch = client.switch_model(model, token=token)
                load.mark(f"switched in {switch.seconds:.1f} s")
            time.sleep(seconds / 3)
    return load


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="host:port, or any gRPC name; without it a service of our own")
    parser.add_argument("--rate", type=float, help="calls a second; without it what is easy, 5 at most")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--timeout", type=float, default=30.0, help="deadline of a call in seconds")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--clips", type=int, default=1, help="of a call")
    parser.add_argument("--duration", type=float, default=0.32, help="of a clip in seconds")
    parser.add_argument("--channels", type=int, default=1, help="connections that calls go round")
    parser.add_argument(
        "--health-check", action="store_true", help="leave addresses that are not SERVING (headless Services)"
    )
    parser.add_argument("--tls-ca", type=Path, help="authorities in PEM: speak TLS")
    parser.add_argument("--output", type=Path, default=Path("build/bench/load"))
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the plot of an output, and end")
    return parser.parse_args()


def main() -> int:
    """Load, write, print. Returns the exit code."""
    arguments = _arguments()
    if arguments.plot is not None:
        marks = json.loads((arguments.plot / "summary.json").read_text())["marks"]
        plot(read_calls(arguments.plot / "calls.jsonl"), marks, arguments.plot / "load.png")
        return 0
    plan = LoadPlan(
        rate=MOST if arguments.rate is None else arguments.rate,
        timeout=arguments.timeout,
        num_inference_steps=arguments.steps,
        clip_count=arguments.clips,
        duration=arguments.duration,
        channels=arguments.channels,
        health_check=arguments.health_check,
        tls_ca=arguments.tls_ca,
    )
    if arguments.target is None:
        load = _demonstrate(plan, arguments.rate is None, arguments.seconds, arguments.output)
    else:
        if arguments.rate is None:
            plan = easy(arguments.target, plan)
        with Load(arguments.target, plan, arguments.output) as load:
            try:
                time.sleep(arguments.seconds)
            except KeyboardInterrupt:
                load.mark("interrupted")
    summary = write_results(load, arguments.output)
    print(json.dumps(summary, indent=2, default=str))
    return 1 if summary["failed"] or summary["mixed"] else 0


if __name__ == "__main__":
    sys.exit(main())
