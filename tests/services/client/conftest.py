import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from services.client.transport import AsyncioTransport, BlockingTransport
from tests.services.client.serving import FACES, Told, serving


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that calls wait between tries. They pass at once, on the clock of deadlines as well."""
    waited: list[float] = []

    async def pause(transport: object, seconds: float) -> None:
        waited.append(seconds)

    for transport in (BlockingTransport, AsyncioTransport):
        monkeypatch.setattr(transport, "pause", pause)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(waited))
    monkeypatch.setattr("services.client.calls.time", clock)
    return waited


@pytest.fixture
def target(told: Told) -> Iterator[str]:
    """Where one gateway serves everything."""
    with serving(told) as target:
        yield target
