"""Requests wait for room in the generation service's queue, in a line per caller."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from services.errors import InvalidInputError, QueueFullError, QuotaExceededError, invalid
from services.web.waiting import WaitingRoom
from tests.services.explanation import serving as explanation
from tests.services.generation.serving import serving, tiny_engine
from tests.services.web.hosting import calling, hosting_web

PROMPT = "a dog barks"


def _room(seconds: float) -> tuple[WaitingRoom, Gauge]:
    waiting = Gauge("waiting", "Those who wait.", registry=CollectorRegistry())
    return WaitingRoom(seconds, waiting), waiting


def _count(waiting: Gauge) -> float:
    return next(iter(waiting.collect())).samples[0].value


class _Queue:
    """A queue with some places, which refuses at once when they are taken."""

    def __init__(self, places: int) -> None:
        self.places, self.entered = places, list[str]()

    async def take(self, name: str) -> str:
        if not self.places:
            raise QueueFullError("full", retry_after=0.001)
        self.places -= 1
        self.entered.append(name)
        return name


async def test_those_who_wait_get_in_in_the_order_of_their_arrival() -> None:
    (room, waiting), queue = _room(60), _Queue(1)
    names = [str(number) for number in range(20)]
    tasks = [asyncio.create_task(room.enter("ann", lambda name=name: queue.take(name))) for name in names]  # type: ignore[misc]
    while _count(waiting) < 19:
        await asyncio.sleep(0)
    for _ in range(19):
        queue.places += 1
        before = len(queue.entered)
        while len(queue.entered) == before:
            await asyncio.sleep(0.001)
    assert await asyncio.gather(*tasks) == names == queue.entered
    assert not room._lines


async def test_nobody_waits_behind_another_caller() -> None:
    (room, waiting), full, free = _room(60), _Queue(0), _Queue(1)
    held = asyncio.create_task(room.enter("ann", lambda: full.take("ann")))
    while not _count(waiting):
        await asyncio.sleep(0)
    assert await room.enter("bob", lambda: free.take("bob")) == "bob"
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held
    assert not room._lines


async def test_who_has_to_wait_is_told_so_once() -> None:
    (room, waiting), queue, told = _room(60), _Queue(0), list[str]()
    held = asyncio.create_task(room.enter("ann", lambda: queue.take("1"), lambda: told.append("1")))
    while not _count(waiting):
        await asyncio.sleep(0)
    behind = asyncio.create_task(room.enter("ann", lambda: queue.take("2"), lambda: told.append("2")))
    while _count(waiting) < 2:
        await asyncio.sleep(0)
    queue.places = 3
    assert [await held, await behind] == ["1", "2"]
    assert await room.enter("ann", lambda: queue.take("3"), lambda: told.append("3")) == "3"
    assert told == ["1", "2"]


@pytest.mark.parametrize("seconds", [0.0, 0.05])
async def test_a_queue_that_stays_full_refuses_in_the_end(seconds: float) -> None:
    (room, _), queue = _room(seconds), _Queue(0)
    found = await asyncio.gather(
        *(room.enter("ann", lambda: queue.take("ann")) for _ in range(3)), return_exceptions=True
    )
    assert [type(error) for error in found] == [QueueFullError] * 3
    assert not room._lines


async def test_other_errors_and_quotas_do_not_wait() -> None:
    room, _ = _room(60)

    async def wrong() -> None:
        raise invalid("seed", "is wrong")

    async def used_up() -> None:
        raise QuotaExceededError("used up", retry_after=0.001)

    with pytest.raises(InvalidInputError):
        await room.enter("ann", wrong)
    with pytest.raises(QuotaExceededError):
        await room.enter("ann", used_up)


@pytest.fixture
async def crowded() -> AsyncIterator[httpx.AsyncClient]:
    """A web door in front of a service with room for three clips, two of which wait."""
    with (
        tiny_engine(batch_shapes=(1,), max_queue=2, max_clip_count=1) as engine,
        serving(engine) as served,
        hosting_web(generation=served.target) as url,
    ):
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            yield http


@pytest.mark.parametrize("stream", ["audio", "sse"])
async def test_more_requests_than_the_service_has_room_for_all_get_their_clips(
    crowded: httpx.AsyncClient, stream: str
) -> None:
    body = {"input": PROMPT, "num_inference_steps": 2, "audio_length": 0.64, "stream_format": stream}
    found = await asyncio.gather(*(crowded.post("/v1/audio/generate", json=body) for _ in range(20)))
    assert {one.status_code for one in found} == {200}
    if stream == "sse":
        assert all("event: finished" in one.text for one in found)


async def test_explanations_wait_for_room_too() -> None:
    with (
        explanation.serving(explanation.tiny_explainer(), max_queue=1) as explained,
        hosting_web(generation="127.0.0.1:1", explanation=explained.target) as url,
    ):
        body = {"prompt": PROMPT, "num_inference_steps": 1, "audio_length": 0.64, "method": "attention"}
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            calls = (http.post("/v1/audio/explanations", json={**body, "seed": seed}) for seed in range(6))
            found = await asyncio.gather(*calls)
    assert [one.status_code for one in found] == [200] * 6


async def test_without_a_wait_a_full_queue_is_said_at_once() -> None:
    with (
        tiny_engine(batch_shapes=(1,), max_queue=1, max_clip_count=1) as engine,
        serving(engine) as served,
        hosting_web(generation=served.target, wait_seconds=0) as url,
    ):
        body = {"input": PROMPT, "num_inference_steps": 200}
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            found = await asyncio.gather(*(http.post("/v1/audio/generate", json=body) for _ in range(8)))
        refused = [one for one in found if one.status_code == 503]
        assert refused
        assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
        with calling(url) as later:
            assert later.get("/metrics").text.count("milonga_http_requests_waiting 0.0") == 1
