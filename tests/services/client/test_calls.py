"""Retries, deadlines, addresses: on both faces."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.client import TLS, AsyncAudioClient, AudioClient, Queued
from services.errors import (
    DeadlineExceededError,
    InvalidInputError,
    MilongaError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
)
from tests.services.client.serving import Refusal, Told, ask, serving
from tests.services.runtime.certificates import make_authority, make_identity
from tests.waiting import until

UNAVAILABLE = Refusal(code=grpc.StatusCode.UNAVAILABLE)
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def _list(client: Any) -> Any:
    return client.list_scorers()


def test_a_service_that_is_away_is_tried_again(
    face: str, told: Told, target: str, waits: list[float]
) -> None:
    told.refusals = [UNAVAILABLE] * 2
    assert len(ask(face, _list, target).scorers) == 2
    assert waits == [pytest.approx(0.2, rel=0.2), pytest.approx(0.6, rel=0.2)]


def test_a_call_that_a_stopping_server_reset_is_tried_again(
    face: str, told: Told, target: str, waits: list[float]
) -> None:
    reset = Refusal(code=grpc.StatusCode.CANCELLED, bare=True)
    told.refusals = [reset]
    assert len(ask(face, _list, target).scorers) == 2
    told.refusals = [reset]
    with pytest.raises(ServiceUnavailableError, match="the service stopped"):
        ask(face, _list, target, retries=0)
    told.refusals = [Refusal(code=grpc.StatusCode.CANCELLED)]
    with pytest.raises(RequestCancelledError):
        ask(face, _list, target)


def test_a_full_queue_is_left_alone_as_long_as_it_asks(
    face: str, told: Told, target: str, waits: list[float]
) -> None:
    told.refusals = [Refusal(code=EXHAUSTED, retry_after=0.6)]
    assert len(ask(face, _list, target).scorers) == 2
    (wait,) = waits
    assert 0.6 <= wait <= 0.6 * 1.2


def test_unavailable_may_say_when_to_come_back_too(
    face: str, told: Told, target: str, waits: list[float]
) -> None:
    told.refusals = [Refusal(code=grpc.StatusCode.UNAVAILABLE, retry_after=0.6)]
    ask(face, _list, target)
    (wait,) = waits
    assert 0.6 <= wait <= 0.6 * 1.2


def test_after_the_last_try_the_error_is_raised(face: str, told: Told, target: str) -> None:
    told.refusals = [Refusal(code=EXHAUSTED, retry_after=0.01)] * 9
    with pytest.raises(QueueFullError, match="told so") as caught:
        ask(face, _list, target, retries=1)
    assert (caught.value.retry_after, len(told.requests)) == (0.01, 2)
    with pytest.raises(QueueFullError):
        ask(face, _list, target, retries=0)
    assert len(told.requests) == 3


@pytest.mark.parametrize("code", [EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT])
def test_what_will_not_get_better_is_not_tried_again(
    face: str, told: Told, target: str, code: grpc.StatusCode
) -> None:
    told.refusals = [Refusal(code=code)]
    with pytest.raises(MilongaError) as caught:
        ask(face, _list, target)
    assert not isinstance(caught.value, QueueFullError)
    assert len(told.requests) == 1


def test_a_wait_that_outlasts_the_deadline_is_not_begun(
    face: str, told: Told, target: str, waits: list[float]
) -> None:
    told.refusals = [Refusal(code=EXHAUSTED, retry_after=30)]
    with pytest.raises(QueueFullError):
        ask(face, lambda client: client.list_scorers(timeout=20), target)
    assert waits == []


def test_the_deadline_spans_all_tries(face: str, told: Told, target: str, waits: list[float]) -> None:
    told.refusals = [UNAVAILABLE] * 9
    with pytest.raises(ServiceUnavailableError):
        ask(face, lambda client: client.list_scorers(timeout=6), target, retries=4)
    # About 0.2, 0.6 and 1.8 s; the next, of 5, would be too long.
    assert len(waits) == 3
    assert len(told.left) == 4
    for number, left in enumerate(told.left):
        assert left < 1.05 * (6.0 - sum(waits[:number]))  # gRPC sends about what it is told


def test_a_slow_service_meets_the_deadline(face: str, told: Told, target: str) -> None:
    told.answering.clear()
    with pytest.raises(DeadlineExceededError, match="give a longer timeout or send less sound at once"):
        ask(face, lambda client: client.embed_text(["rain"], timeout=0.2), target)
    with pytest.raises(DeadlineExceededError):
        ask(face, _list, target, timeout=0.2)


def test_no_deadline_is_no_fault(face: str, target: str) -> None:
    assert ask(face, lambda client: client.list_scorers(timeout=float("inf")), target).scorers


def _collect(face: str, target: str, seen: list[int], **options: Any) -> None:
    """Stream from a service, and note the positions that come."""

    async def run() -> None:
        async with AsyncAudioClient(target, **options) as client:
            async for update in client.stream("rain"):
                assert isinstance(update, Queued)
                seen.append(update.position)

    if face == "asyncio":
        asyncio.run(run())
        return
    with AudioClient(target, **options) as client:
        for update in client.stream("rain"):
            assert isinstance(update, Queued)
            seen.append(update.position)


def test_a_stream_is_tried_again_before_its_first_event_only(
    face: str, told: Told, target: str, waits: list[float]
) -> None:
    seen: list[int] = []
    told.refusals = [UNAVAILABLE, Refusal(code=EXHAUSTED, retry_after=0.01)]
    _collect(face, target, seen)
    assert (seen, len(told.requests)) == ([0, 1, 2], 3)
    seen.clear()
    told.refusals = [Refusal(code=grpc.StatusCode.UNAVAILABLE, after=2)]
    with pytest.raises(ServiceUnavailableError, match="milonga serve generation"):
        _collect(face, target, seen)
    assert (seen, len(told.requests)) == ([0, 1], 4)


def test_services_have_addresses_of_their_own(face: str) -> None:
    generation, scoring, reward = Told(), Told(), Told()
    with (
        serving(generation, "generation") as target,
        serving(scoring, "scoring") as scoring_target,
        serving(reward, "reward") as reward_target,
    ):
        places = {"target": target, "scoring": scoring_target, "reward": reward_target}
        ask(face, lambda client: client.get_model(), **places)
        ask(face, lambda client: client.list_scorers(), **places)
        ask(face, lambda client: client.get_reward_model(), **places)
        assert [len(told.requests) for told in (generation, scoring, reward)] == [1, 1, 1]
        with pytest.raises(MilongaError, match=r"no scoring service answers there .* as scoring$"):
            ask(face, lambda client: client.list_scorers(), target)


CALLS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("generation", "target", lambda client: client.get_model()),
    ("scoring", "scoring", lambda client: client.list_scorers()),
    ("reward", "reward", lambda client: client.rank_audio("rain", [Path("/not/read/before")])),
]


@pytest.mark.parametrize(("service", "argument", "call"), CALLS)
def test_a_service_without_an_address_is_named(
    face: str, service: str, argument: str, call: Callable[[Any], Any]
) -> None:
    with pytest.raises(InvalidInputError, match=f"{service} service has no address") as caught:
        ask(face, call)
    assert [violation.field for violation in caught.value.violations] == [argument]
    with pytest.raises(InvalidInputError, match="is empty"):
        ask(face, call, **{argument: ""})


def test_the_hint_names_the_service_that_is_away(face: str) -> None:
    for service, _, call in (*CALLS[:2], ("reward", "", lambda client: client.get_reward_model())):
        with pytest.raises(ServiceUnavailableError, match=f"^127.0.0.1:1: .*milonga serve {service}$"):
            ask(face, call, "127.0.0.1:1", retries=0)


def test_a_service_is_found_again_after_it_comes_back() -> None:
    told = Told()

    def answers(client: AudioClient) -> bool:
        with contextlib.suppress(ServiceUnavailableError):
            return bool(client.list_scorers().scorers)
        return False

    with serving(told) as target, AudioClient(target, retries=0) as client:
        client.list_scorers()
        port = target.rpartition(":")[2]
        client_of_later = AudioClient(target, retries=0)
    with pytest.raises(ServiceUnavailableError):
        client_of_later.list_scorers()
    with serving(told, listen=f"127.0.0.1:{port}"):
        until(lambda: answers(client_of_later))
    client_of_later.close()


def test_channel_options_reach_the_channel(face: str, told: Told, target: str) -> None:
    options = [("grpc.primary_user_agent", "tests")]
    ask(face, _list, target, channel_options=options)
    assert told.metadata[0]["user-agent"].startswith("tests ")
    with pytest.raises(MilongaError, match="larger than max"):
        ask(face, _list, target, channel_options=[("grpc.max_receive_message_length", 5)])


def test_tls_and_the_token_go_to_every_service(face: str, told: Told, tmp_path: Path) -> None:
    authority = make_authority(tmp_path, "authority")
    server = make_identity(tmp_path, "server", authority)
    credentials = grpc.ssl_server_credentials([(server.key_file.read_bytes(), server.cert_file.read_bytes())])
    with (
        serving(told, "scoring", credentials=credentials) as scoring,
        serving(told, "reward", credentials=credentials) as reward,
    ):
        options: dict[str, Any] = {
            "scoring": scoring,
            "reward": reward,
            "tls": TLS(ca_file=authority.cert_file),
            "token": "secret",
        }
        ask(face, lambda client: client.list_scorers(), **options)
        ask(face, lambda client: client.get_reward_model(), **options)
    assert [metadata["authorization"] for metadata in told.metadata] == ["Bearer secret"] * 2


def test_a_closed_client_says_so(face: str, target: str) -> None:
    if face == "blocking":
        client = AudioClient(target)
        client.close()
        with pytest.raises(RequestCancelledError, match="the client was closed"):
            client.list_scorers()
        return

    async def run() -> None:
        client = AsyncAudioClient(target)
        await client.close()
        with pytest.raises(RequestCancelledError, match="the client was closed"):
            await client.list_scorers()

    asyncio.run(run())


def test_closing_ends_a_wait_between_tries(told: Told, target: str) -> None:
    told.refusals = [Refusal(code=EXHAUSTED, retry_after=60)]
    errors: list[MilongaError] = []
    client = AudioClient(target)

    def call() -> None:
        with pytest.raises(MilongaError) as caught:
            client.list_scorers()
        errors.append(caught.value)

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: bool(told.requests))
    client.close()
    thread.join(30)
    assert [type(error) for error in errors] == [RequestCancelledError]


def test_closing_cancels_calls_and_no_tasks(told: Told, target: str) -> None:
    told.answering.clear()

    async def run() -> None:
        client = AsyncAudioClient(target)
        call = asyncio.create_task(client.list_scorers())
        await asyncio.to_thread(until, lambda: bool(told.requests))
        await client.close()
        with pytest.raises(RequestCancelledError, match="the client was closed"):
            await call

    asyncio.run(run())


def test_a_cancelled_task_is_cancelled(told: Told, target: str) -> None:
    told.answering.clear()

    async def run() -> None:
        async with AsyncAudioClient(target) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.list_scorers(), 0.2)

    asyncio.run(run())


def test_the_blocking_client_works_next_to_a_running_loop(target: str) -> None:
    async def run() -> list[Any]:
        # As in a notebook: its cells run inside a loop.
        with AudioClient(target) as client:
            client.list_scorers()
            updates = client.stream("rain")
            first = next(updates)
            del updates
            return [first]

    assert asyncio.run(run()) == [Queued(position=0)]
