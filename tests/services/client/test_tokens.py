"""The client's token and priority: where they come from, and where they may travel."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from services.client import TLS, AsyncAudioClient, AudioClient
from services.engine import Engine
from services.errors import (
    InvalidInputError,
    PermissionDeniedError,
    QuotaExceededError,
    UnauthenticatedError,
)
from services.runtime import access
from services.runtime.tokens import new_token, token_digest
from tests.services.generation.serving import Serving, serving, tiny_engine

TOKEN, OBSERVER = new_token(), new_token()
PROMPT = "a dog barks"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    path = tmp_path_factory.mktemp("callers") / "callers.toml"
    path.write_text(
        f"[callers.studio]\ntokens = ['{token_digest(TOKEN)}']\nwork_per_minute = 20\n"
        f"[callers.watch]\ntokens = ['{token_digest(OBSERVER)}']\nroles = ['observer']\n"
    )
    engine: Engine
    with tiny_engine() as engine, serving(engine, callers_file=path) as served:
        yield served


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "studio.token"
    path.write_text(f"{TOKEN}\n")
    return path


def test_the_token_names_the_caller_of_unary_and_streaming_calls(served: Serving) -> None:
    with AudioClient(served.target, token=TOKEN, retries=0) as client:
        assert client.get_model().model.name == "tiny"
        assert client.generate(PROMPT, num_inference_steps=1, duration=0.64).clips
        assert list(client.stream(PROMPT, num_inference_steps=1, duration=0.64))


async def test_the_asyncio_client_sends_it_too(served: Serving) -> None:
    async with AsyncAudioClient(served.target, token=TOKEN, retries=0) as client:
        assert (await client.get_model()).model.name == "tiny"
    async with AsyncAudioClient(served.target, retries=0) as client:
        with pytest.raises(UnauthenticatedError, match="--token-file"):
            await client.get_model()


def test_an_observer_sees_the_model_and_makes_no_sound(served: Serving) -> None:
    with AudioClient(served.target, token=OBSERVER, retries=0) as client:
        assert client.get_model().model.name == "tiny"
        with pytest.raises(PermissionDeniedError, match="'watch' with the role observer may not call"):
            client.generate(PROMPT)


def test_work_is_charged_by_clips_steps_and_seconds_and_the_refused_request_is_cancelled(
    served: Serving,
) -> None:
    with AudioClient(served.target, token=TOKEN, retries=0) as client:
        options: Any = {"num_inference_steps": 10, "duration": 0.64, "clip_count": 2}
        client.generate(PROMPT, **options)
        with pytest.raises(QuotaExceededError, match="20 work units a minute") as caught:
            client.generate(PROMPT, **options)
    assert 0 < caught.value.retry_after <= 60
    assert not served.engine.stats.failed


def test_the_default_is_the_file_of_the_environment(
    served: Serving, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILONGA_TOKEN_FILE", str(token_file))
    with AudioClient(served.target, retries=0) as client:
        client.get_model()
    with AudioClient(served.target, token=OBSERVER, retries=0) as client:
        client.get_model()
        with pytest.raises(PermissionDeniedError):
            client.generate(PROMPT)
    with AudioClient(served.target, token="", retries=0) as client, pytest.raises(UnauthenticatedError):
        client.get_model()
    token_file.unlink()
    with pytest.raises(InvalidInputError, match=r"MILONGA_TOKEN_FILE: is .*can't be read"):
        AudioClient(served.target)


@pytest.mark.parametrize("addresses", [("far.example:1",), ("localhost:1", "10.0.0.7:1")])
def test_a_token_leaves_this_machine_by_tls_or_on_request_only(addresses: tuple[str, ...]) -> None:
    target, *scoring = addresses
    options: Any = {"scoring": scoring[0] if scoring else None}
    with pytest.raises(InvalidInputError, match=f"would travel to {addresses[-1]} in plaintext"):
        AudioClient(target, token=TOKEN, **options)
    AudioClient(target, token=TOKEN, tls=TLS(), **options).close()
    AudioClient(target, token=TOKEN, allow_insecure_token=True, **options).close()
    AudioClient("localhost:1", scoring="unix:/socket", token=TOKEN).close()


def test_the_priority_arrives(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    admit = served.server.access.admit

    def watch(method: str, context: Any) -> Any:
        caller = admit(method, context)
        seen.append(caller.priority)
        return caller

    monkeypatch.setattr(served.server.access, "admit", watch)
    for options in ({}, {"priority": "batch"}):
        with AudioClient(served.target, token=TOKEN, retries=0, **options) as client:  # type: ignore[arg-type]
            client.get_model()
    assert seen == ["interactive", "batch"]


async def test_a_stream_ends_at_the_first_request_after_its_token_was_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "POLL_SECONDS", 0.0)
    path = tmp_path / "callers.toml"
    path.write_text(f"[callers.studio]\ntokens = ['{token_digest(TOKEN)}']\ncalls_per_minute = 1\n")
    with tiny_engine() as engine, serving(engine, callers_file=path) as served:
        async with grpc.aio.insecure_channel(served.target) as channel:
            rpc: Any = channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                service_pb2.ModelInferRequest.SerializeToString,
                service_pb2.ModelStreamInferResponse.FromString,
            )
            stream = rpc(metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=60)
            for _ in range(3):
                await stream.write(service_pb2.ModelInferRequest(model_name="absent"))
                assert "unknown model" in (await stream.read()).error_message
            path.write_text("")
            await stream.write(service_pb2.ModelInferRequest(model_name="absent"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_variable_lets_tokens_travel_in_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILONGA_ALLOW_INSECURE_TOKEN", "1")
    AudioClient("far.example:1", token=TOKEN).close()
    with pytest.raises(InvalidInputError, match="in plaintext"):
        AudioClient("far.example:1", token=TOKEN, allow_insecure_token=False)
    monkeypatch.setenv("MILONGA_ALLOW_INSECURE_TOKEN", "0")
    with pytest.raises(InvalidInputError, match="in plaintext"):
        AudioClient("far.example:1", token=TOKEN)
