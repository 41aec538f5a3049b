"""What microbatching and the embedding cache gain, and what each service weighs, on this machine.

    python -m benchmarks.judging [--clips 96] [--callers 16] [--rounds 3] [--output FILE]

Two processes of the scoring service, alike but for `MILONGA_MAX_BATCH_SECONDS`: the one shares batches among
callers, the other runs every clip alone. Both are loaded in turns by as many callers, one clip per call. The
cache: embedding prompts that were met before against new ones. Memory: of all three services, ready and after
work.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measuring import RATE, machine, memory_mib, noise_clips, seconds, service_plan, write_report
from services.client import AudioClient
from services.processes import ServiceProcess, running

PROMPTS = ("A dog barks then a siren wails", "A bird sings while rain falls", "A bell tolls")
ALONE = "0.001"
"""Seconds of sound a batch: less than any clip has, so that each runs alone."""


def score_all(client: AudioClient, clips: Sequence[NDArray[np.float32]], callers: int) -> None:
    """Make one call per clip, from `callers` threads."""
    with ThreadPoolExecutor(callers) as pool:
        for future in [pool.submit(client.score_audio, [(PROMPTS[0], (clip, RATE))]) for clip in clips]:
            future.result()


def batching(arguments: argparse.Namespace, logs: Path) -> dict[str, float]:
    """Clips a second with shared batches, and with each clip alone."""
    clips = noise_clips(arguments.clips)
    plans = [service_plan("scoring", "--scorer", "a=mini:clap-a") for _ in range(2)]
    alone = os.environ | {"MILONGA_MAX_BATCH_SECONDS": ALONE}
    (logs / "alone").mkdir()
    with (
        running(plans[:1], logs=logs) as (shared,),
        running(plans[1:], logs=logs / "alone", environment=alone) as (single,),
    ):
        clients = []
        for service in (shared, single):
            service.wait_until_serving()
            clients.append(AudioClient(scoring=service.target))
            score_all(clients[-1], clips[:8], 4)
        rounds = [
            [seconds(lambda one=client: score_all(one, clips, arguments.callers)) for client in clients]  # type: ignore[misc]
            for _ in range(arguments.rounds)
        ]
        for client in clients:
            client.close()
    together, apart = (median(times) for times in zip(*rounds, strict=True))
    return {
        "callers": arguments.callers,
        "shared_clips_a_second": arguments.clips / together,
        "alone_clips_a_second": arguments.clips / apart,
        "shared_over_alone": median(one[1] / one[0] for one in rounds),
    }


def caching(client: AudioClient, rounds: int) -> dict[str, float]:
    """Seconds of embedding 64 prompts that are new, and of the same prompts again."""
    ratios, again = [], []
    for number in range(rounds):
        prompts = [f"a dog barks then a siren wails {number} {index}" for index in range(64)]
        new, old = (seconds(lambda p=prompts: client.embed_text(p, scorers=["a"])) for _ in range(2))  # type: ignore[misc]
        ratios.append(new / old)
        again.append(old)
    return {"prompts": 64, "new_over_known": median(ratios), "known_seconds": median(again)}


def memory(services: Sequence[ServiceProcess], name: str) -> dict[str, float]:
    """Return the VmRSS or VmHWM of each service in MiB, by service."""
    return {service.plan.name: memory_mib(service.process.pid)[name] for service in services}


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/bench/judging.json"))
    arguments = parser.parse_args()
    plans = [
        service_plan("generation", "--model", "mini"),
        service_plan("scoring", "--scorer", "a=mini:clap-a", "--scorer", "b=mini:clap-b"),
        service_plan("reward", "--model", "mini"),
    ]
    report: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
    }
    with TemporaryDirectory() as folder:
        report["microbatching"] = batching(arguments, Path(folder))
        with running(plans, logs=Path(folder)) as services:
            for service in services:
                service.wait_until_serving()
            report["resident_mib_when_ready"] = memory(services, "VmRSS")
            generation, scoring, reward = (service.target for service in services)
            with AudioClient(generation, scoring=scoring, reward=reward) as client:
                client.embed_text(PROMPTS)
                report["cache"] = caching(client, arguments.rounds)
                clips = client.generate(PROMPTS[0], seed=0, clip_count=8).clips
                pairs = [(prompt, clip) for prompt in PROMPTS for clip in clips]
                client.score_audio(pairs)
                client.compute_rewards(pairs)
                report["peak_mib_after_work"] = memory(services, "VmHWM")
    write_report(arguments.output, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
