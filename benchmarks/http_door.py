"""What the web door adds: time per request, memory, and many streams at once.

    python -m benchmarks.http_door [--requests 40] [--streams 200]

Starts the generation service with `mini` and the web door on free ports. Requests alternate between
gRPC and HTTP: the same prompt, seed and steps.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from typing import Any

import httpx

from benchmarks.measuring import PROMPT, memory_mib
from services.client import AsyncAudioClient
from services.processes import ServicePlan, free_port, running

STEPS = 1
SECONDS = 0.64


def plans() -> list[ServicePlan]:
    """Return the generation service and the web door in front of it."""
    service, door = (f"127.0.0.1:{free_port()}" for _ in range(2))
    return [
        ServicePlan(name="generation", arguments=("--model", "mini", "--threads", "1"), address=service),
        ServicePlan(name="web", arguments=("--generation", service), address=door, http=True),
    ]


async def latency(grpc: AsyncAudioClient, http: httpx.AsyncClient, requests: int) -> dict[str, float]:
    """Return medians in milliseconds of requests in turn."""
    times: dict[str, list[float]] = {
        "model by gRPC": [],
        "models by HTTP": [],
        "clip by gRPC": [],
        "clip by HTTP": [],
    }
    body = {"input": PROMPT, "seed": 1, "num_inference_steps": STEPS, "audio_length": SECONDS}

    async def timed(name: str, work: Any) -> None:
        start = time.perf_counter()
        await work
        times[name].append((time.perf_counter() - start) * 1000)

    for _ in range(requests):
        await timed("model by gRPC", grpc.get_model())
        await timed("models by HTTP", http.get("/v1/models"))
        await timed(
            "clip by gRPC", grpc.generate(PROMPT, seed=1, num_inference_steps=STEPS, duration=SECONDS)
        )
        await timed("clip by HTTP", http.post("/v1/audio/generate", json=body))
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


async def streams(http: httpx.AsyncClient, count: int) -> Counter[str]:
    """Return how many of `count` streams at once ended how: by the name of the last event, or the status."""
    body = {
        "input": PROMPT, "num_inference_steps": STEPS, "audio_length": SECONDS, "stream_format": "sse",
    }  # fmt: skip

    async def one() -> str:
        last = ""
        async with http.stream("POST", "/v1/audio/generate", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    last = line.removeprefix("event: ")
            return last or str(response.status_code)

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


async def measure(requests: int, count: int) -> dict[str, Any]:
    """Run the services and measure."""
    with running(plans()) as (service, door):
        for one in (service, door):
            one.wait_until_serving()
        limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
        async with (
            AsyncAudioClient(service.target) as grpc,
            httpx.AsyncClient(
                base_url=f"http://{door.target}", timeout=240, limits=limits, trust_env=False
            ) as http,
        ):
            await latency(grpc, http, 3)
            found: dict[str, Any] = {"milliseconds": await latency(grpc, http, requests)}
            found["memory_mib"] = memory_mib(door.process.pid)
            start = time.perf_counter()
            found["streams"] = dict(await streams(http, count))
            found["streams_seconds"] = round(time.perf_counter() - start, 1)
            found["memory_mib_after_streams"] = memory_mib(door.process.pid)
            return found


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description="Measure what the web door adds.")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--streams", type=int, default=200)
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(measure(arguments.requests, arguments.streams)), indent=1))


if __name__ == "__main__":
    main()
