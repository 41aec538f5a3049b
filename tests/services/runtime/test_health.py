"""The health service under watch: routers and clients choose replicas by it."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.client import AudioClient
from services.engine import Engine
from services.errors import ServiceUnavailableError
from tests.services.generation.serving import serving, tiny_engine

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tiny_engine() as engine:
        yield engine


def _watch(channel: grpc.Channel, name: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no rpc
    return stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=60)


def test_every_watcher_is_told_of_the_drain_whoever_left_before(engine: Engine) -> None:
    with serving(engine, grace_seconds=60) as served, grpc.insecure_channel(served.target) as channel:
        first, second, third = (_watch(channel, "milonga.v1.GenerationService") for _ in range(3))
        assert [next(watch).status for watch in (first, second, third)] == [SERVING] * 3
        first.cancel()
        fourth = _watch(channel, "")
        assert next(fourth).status == SERVING
        assert next(_watch(channel, "absent")).status == UNKNOWN
        start = time.monotonic()
        served.run(served.server.drain())
        # Watches are ended, not waited for as long as calls are.
        assert time.monotonic() - start < 30
        for watch in (second, third, fourth):
            assert [told.status for told in watch] == [NOT_SERVING]


def test_a_client_leaves_the_address_that_is_not_serving(engine: Engine) -> None:
    with (
        tiny_engine() as second,
        serving(engine) as one,
        serving(second, drain_delay_seconds=4, grace_seconds=60) as other,
        AudioClient(f"ipv4:{one.target},{other.target}", retries=0, health_check=True) as client,
    ):
        end = time.monotonic() + 60
        while not second.stats.finished:  # until both are connected, calls go to one alone
            client.generate("a dog barks")
            assert time.monotonic() < end
        draining = asyncio.run_coroutine_threadsafe(other.server.drain(), other.loop)
        time.sleep(1)
        told = second.stats.finished
        while not draining.done():
            client.generate("a dog barks")
        for _ in range(4):
            client.generate("a dog barks")
        assert second.stats.finished == told


def test_behind_one_address_there_is_no_other_to_go_to(engine: Engine) -> None:
    with (
        serving(engine, drain_delay_seconds=2) as served,
        AudioClient(served.target, retries=0) as client,
        AudioClient(served.target, retries=0, health_check=True) as choosy,
    ):
        assert choosy.get_model().model.name == "tiny"
        draining = asyncio.run_coroutine_threadsafe(served.server.drain(), served.loop)
        with pytest.raises(ServiceUnavailableError):
            _call_until_it_fails(choosy)
        if not draining.done():
            assert client.get_model().model.name == "tiny"
        draining.result(60)


def _call_until_it_fails(client: AudioClient) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        client.get_model()
