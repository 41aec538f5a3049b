"""The health service under watch: routers and clients choose replicas by it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.client import AudioClient
from services.engine import Engine
from services.errors import ServiceUnavailableError
from tests.services.generation.serving import serving, tiny_engine
from tests.waiting import until

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


def test_every_watcher_is_notified_of_the_drain_although_others_left(engine: Engine) -> None:
    with serving(engine, grace_seconds=3600) as served, grpc.insecure_channel(served.target) as channel:
        first, second, third = (_watch(channel, "milonga.v1.GenerationService") for _ in range(3))
        assert [next(watch).status for watch in (first, second, third)] == [SERVING] * 3
        first.cancel()
        fourth = _watch(channel, "")
        assert next(fourth).status == SERVING
        assert next(_watch(channel, "absent")).status == UNKNOWN
        # Watches are ended, not waited for as long as calls are: for the whole grace.
        served.run(served.server.drain())
        for watch in (second, third, fourth):
            assert [told.status for told in watch] == [NOT_SERVING]


def test_a_client_leaves_the_address_that_is_not_serving(engine: Engine) -> None:
    with (
        tiny_engine() as second,
        serving(engine) as one,
        serving(second, drain_delay_seconds=3600) as other,
        AudioClient(f"ipv4:{one.target},{other.target}", retries=0, health_check=True) as client,
    ):

        def reaches_the_second(calls: int = 1) -> bool:
            before = second.stats.finished
            for _ in range(calls):
                client.generate("a dog barks", num_inference_steps=1)
            return second.stats.finished > before

        until(reaches_the_second)  # before both are connected, calls go to one alone
        draining = asyncio.run_coroutine_threadsafe(other.server.drain(), other.loop)
        until(lambda: not reaches_the_second(4))  # taking turns, one of two would
        assert not reaches_the_second(20)
        draining.cancel()


def test_behind_one_address_there_is_no_other_to_go_to(engine: Engine) -> None:
    with (
        serving(engine, drain_delay_seconds=3600) as served,
        AudioClient(served.target, retries=0) as client,
        AudioClient(served.target, retries=0, health_check=True) as choosy,
    ):
        assert choosy.get_model().model.name == "tiny"
        draining = asyncio.run_coroutine_threadsafe(served.server.drain(), served.loop)
        until(lambda: not _answers(choosy))
        assert _answers(client)
        draining.cancel()


def _answers(client: AudioClient) -> bool:
    try:
        return client.get_model().model.name == "tiny"
    except ServiceUnavailableError:
        return False
