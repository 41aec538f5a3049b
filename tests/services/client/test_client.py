import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.client import (
    TLS,
    AsyncAudioClient,
    AudioClient,
    Clip,
    Finished,
    GenerationOptions,
    build_request,
)
from services.engine import Engine
from services.errors import InvalidInputError, MilongaError, ServiceUnavailableError
from tests.services.generation.serving import Serving, serving, tiny_engine
from tests.waiting import until


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tiny_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Serving]:
    with serving(engine) as served:
        yield served


def test_the_client_needs_the_light_install_only() -> None:
    program = (
        "import sys, services.client, services.environment, services.errors; "
        "heavy = {'torch', 'scipy', 'transformers', 'diffusers', 'pydantic', 'structlog'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    paths = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_left_out_or_none_are_absent() -> None:
    absent: GenerationOptions = {"duration": None, "seed": None, "encoding": None, "sampling_rate": None}
    assert build_request("rain", **absent) == build_request("rain")
    assert [field.name for field, _ in build_request("rain").ListFields()] == ["prompt"]


def test_what_the_wire_cannot_carry_is_refused_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        build_request("rain", seed=-1, clip_count=2**31, duration=float("nan"), encoding="aac")
    assert {v.field for v in caught.value.violations} == {"seed", "clip_count", "duration", "encoding"}


def test_a_prompt_of_megabytes_is_refused_before_the_transport_does() -> None:
    with pytest.raises(InvalidInputError, match="prompt: is 2000000 bytes long"):
        build_request("x" * 2_000_000)


def test_a_misspelt_option_is_a_type_error() -> None:
    options: Any = {"steps": 5}
    with pytest.raises(TypeError, match="steps"):
        build_request("rain", **options)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"token": "secret"}, "token"),
        ({"retries": 9}, "retries"),
        ({"tls": TLS(ca_file=Path("/absent/ca.pem"))}, "tls.ca_file"),
    ],
)
def test_bad_connection_options_are_named(options: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        AudioClient("far.example:1", **options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_half_an_identity_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="both"):
        TLS(cert_file=Path("a.pem"))


def test_a_service_that_is_not_there_is_named_in_one_line() -> None:
    with AudioClient("127.0.0.1:1", retries=0) as client, pytest.raises(ServiceUnavailableError) as caught:
        client.generate("rain")
    assert str(caught.value).startswith("127.0.0.1:1: ")
    assert "\n" not in str(caught.value)


def test_an_answer_over_the_size_limit_is_no_full_queue(served: Serving) -> None:
    with (
        AudioClient(served.target, max_response_bytes=1000) as client,
        pytest.raises(MilongaError, match="larger than max") as caught,
    ):
        client.generate("a dog barks")
    assert type(caught.value) is MilongaError


def test_the_client_waits_for_a_service_that_is_just_starting(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names: list[str] = []
    with AudioClient(f"127.0.0.1:{port}", retries=4) as client:
        thread = threading.Thread(target=lambda: names.append(client.get_model(timeout=20).model.name))
        thread.start()
        time.sleep(0.15)
        with serving(engine, listen=f"127.0.0.1:{port}"):
            thread.join()
    assert names == ["tiny"]


def test_both_faces_give_the_same(served: Serving) -> None:
    async def ask() -> tuple[bytes, bytes, str]:
        async with AsyncAudioClient(served.target) as client:
            unary = (await client.generate("a dog barks", seed=5)).clips[0].audio
            updates = [update async for update in client.stream("a dog barks", seed=5)]
            (streamed,) = [update for update in updates if isinstance(update, Clip)]
            assert isinstance(updates[-1], Finished)
            with pytest.raises(InvalidInputError, match="prompt"):
                await client.generate("")
            return unary, streamed.audio, (await client.get_model()).model.name

    with AudioClient(served.target) as client:
        audio = client.generate("a dog barks", seed=5).clips[0].audio
    assert asyncio.run(ask()) == (audio, audio, "tiny")


def test_leaving_an_asynchronous_stream_cancels_it(served: Serving, engine: Engine) -> None:
    before = engine.stats.cancelled

    async def leave() -> None:
        async with AsyncAudioClient(served.target) as client:
            updates = client.stream("a dog barks", num_inference_steps=1000)
            await anext(updates)
            await updates.aclose()

    asyncio.run(leave())
    until(lambda: engine.stats.running == 0)
    assert engine.stats.cancelled == before + 1
