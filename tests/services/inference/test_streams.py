import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest

from services.inference.streams import interleave


class Requests:
    """Numbers 0 to `count` - 1; which of them were read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(self.count):
            self.read += 1
            yield number


async def test_answers_of_one_request_stay_in_order_and_all_arrive() -> None:
    async def answer(number: int) -> AsyncGenerator[tuple[int, int], None]:
        for part in range(3):
            await asyncio.sleep(0.001 * (5 - number))
            yield number, part

    async with aclosing(interleave(Requests(4), answer, 8)) as answers:
        got = [one async for one in answers]
    assert sorted(got) == [(number, part) for number in range(4) for part in range(3)]
    assert got != sorted(got)
    assert all([p for n, p in got if n == number] == [0, 1, 2] for number in range(4))


async def test_no_more_than_so_many_are_under_way() -> None:
    requests, let_go, running, most = Requests(10), asyncio.Event(), 0, 0

    async def answer(number: int) -> AsyncGenerator[int, None]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await let_go.wait()
        running -= 1
        yield number

    async with aclosing(interleave(requests, answer, 3)) as answers:
        first = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0.02)
        assert (running, requests.read) == (3, 4)
        let_go.set()
        got = [await first] + [one async for one in answers]
    assert sorted(got) == list(range(10))
    assert most == 3


async def test_a_caller_who_leaves_ends_them_all() -> None:
    ended: list[int] = []

    async def answer(number: int) -> AsyncGenerator[int, None]:
        try:
            while True:
                yield number
        finally:
            ended.append(number)

    async with asyncio.timeout(5), aclosing(interleave(Requests(3), answer, 8)) as answers:
        assert await anext(answers) in range(3)
    assert sorted(ended) == [0, 1, 2]


async def test_what_one_raises_ends_the_others_and_is_raised() -> None:
    async def answer(number: int) -> AsyncGenerator[int, None]:
        if number == 1:
            raise KeyError(number)
        yield number
        await asyncio.Event().wait()

    async with asyncio.timeout(5), aclosing(interleave(Requests(3), answer, 8)) as answers:
        with pytest.raises(KeyError):
            [one async for one in answers]
