"""The generation service asked by NVIDIA's tritonclient: sync, asyncio and streams, on tiny models."""

import asyncio
import io
import json
import queue
import runpy
import sys
import time
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from services.client import AudioClient
from services.engine import Engine, EngineConfig
from services.inference import SERVICE_NAME
from services.models.manifest import write_manifest
from services.models.tango.loading import load_tango
from services.weights.uri import ResolvedModel
from tests.services.generation.serving import MODEL, Serving, serving, tiny_engine
from tests.services.inference.asking import parameters, refusal, tensor
from tests.tiny import tiny_pipeline
from tests.waiting import until

PROMPTS = ["a dog barks then a siren wails", "a bell rings"]
TOKEN = "of-the-operator"
IDENTITY = {"name": "tiny", "version": "1", "digest": MODEL.digest}


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    """One batch shape, so that equal means bit for bit."""
    with tiny_engine(exact=True, batch_shapes=(4,)) as engine, serving(engine, token=TOKEN) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Serving) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.target) as client:
        yield client


def _inputs(prompts: list[Any] = PROMPTS, /, **tensors: tuple[str, Any]) -> list[triton.InferInput]:
    return [
        tensor("PROMPT", "BYTES", prompts),
        *(tensor(name, datatype, values) for name, (datatype, values) in tensors.items()),
    ]


class Stream:
    """A stream of tritonclient's sync client."""

    def __init__(self, client: triton.InferenceServerClient, **options: Any) -> None:
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: self.answers.put((result, error)), **options)

    def get(self) -> Any:
        result, error = self.answers.get(timeout=60)
        if error is not None:
            raise error
        return result

    def until_final(self) -> list[Any]:
        results = [self.get()]
        while not parameters(results[-1])["triton_final_response"]:
            results.append(self.get())
        return results


@contextmanager
def _stream(client: triton.InferenceServerClient, **options: Any) -> Iterator[Stream]:
    stream = Stream(client, **options)
    try:
        yield stream
    finally:
        client.stop_stream(cancel_requests=True)


def _row(result: Any) -> int:
    return int(result.as_numpy("ROW")[0])


def _native(served: Serving, prompt: str, **options: Any) -> bytes:
    with AudioClient(served.target, retries=0, timeout=60) as native:
        return native.generate(prompt, encoding="float32", **options).clips[0].audio


def test_the_server_says_what_it_serves(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tango")
    assert client.is_model_ready("tango", "1")
    assert not client.is_model_ready("tango", "2")
    assert not client.is_model_ready("another")
    assert client.get_server_metadata().name == "milonga"
    metadata = client.get_model_metadata("tango")
    assert (metadata.name, list(metadata.versions)) == ("tango", ["1"])
    assert {(one.name, one.datatype, tuple(one.shape)) for one in metadata.inputs} == {
        ("PROMPT", "BYTES", (-1,)),
        ("NEGATIVE_PROMPT", "BYTES", (-1,)),
        ("SEED", "INT64", (-1,)),
        ("NUM_INFERENCE_STEPS", "INT32", (-1,)),
        ("GUIDANCE_SCALE", "FP32", (-1,)),
        ("GUIDANCE_STOP", "FP32", (-1,)),
        ("DURATION", "FP32", (-1,)),
        ("SCHEDULER", "BYTES", (-1,)),
        ("LOUDNESS", "FP32", (-1,)),
        ("ADAPTER", "BYTES", (-1,)),
        ("PROFILE", "BYTES", (-1,)),
    }
    assert {(one.name, one.datatype, tuple(one.shape)) for one in metadata.outputs} == {
        ("AUDIO", "FP32", (-1, -1)),
        ("SAMPLE_RATE", "INT32", (1,)),
        ("SEED", "INT64", (-1,)),
        ("DIGEST", "BYTES", (-1,)),
        ("ROW", "INT32", (1,)),
        ("PROGRESS", "FP32", (1,)),
    }
    config = client.get_model_config("tango", as_json=True)["config"]
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert [one["name"] for one in config["input"] if not one.get("optional")] == ["PROMPT"]
    told = {name: value["string_value"] for name, value in config["parameters"].items()}
    assert IDENTITY.items() <= told.items()
    assert (told["max_rows"], told["max_duration"]) == ("8", "2.56")
    (model,) = client.get_model_repository_index().models
    assert (model.name, model.version, model.state) == ("tango", "1", "READY")


def test_health_and_reflection_list_the_service(served: Serving) -> None:
    with grpc.insecure_channel(served.target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no rpc
        answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
        ]
        listed, file = list(reflection.ServerReflectionInfo(iter(asked)))
        assert SERVICE_NAME in {service.name for service in listed.list_services_response.service}
        assert file.file_descriptor_response.file_descriptor_proto


def test_one_request_of_several_prompts(client: triton.InferenceServerClient, served: Serving) -> None:
    result = client.infer("tango", _inputs(SEED=("INT64", [7, 8])), request_id="mine")
    assert result.as_numpy("AUDIO").shape == (2, 10_240)
    assert result.as_numpy("AUDIO").dtype == np.float32
    assert result.as_numpy("SAMPLE_RATE").tolist() == [16_000]
    assert result.as_numpy("SEED").tolist() == [7, 8]
    assert result.as_numpy("DIGEST").tolist() == [MODEL.digest.encode()] * 2
    assert result.as_numpy("PROGRESS") is None
    assert parameters(result) == IDENTITY
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("tango", "1", "mine")
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (7, 8), strict=True)):
        assert result.as_numpy("AUDIO")[row].tobytes() == _native(served, prompt, seed=seed)


def test_every_setting_makes_the_clip_that_the_native_api_makes(
    client: triton.InferenceServerClient, served: Serving
) -> None:
    inputs = _inputs(
        PROMPTS[:1],
        NEGATIVE_PROMPT=("BYTES", ["rain"]),
        SEED=("INT64", [2**62 + 1]),
        NUM_INFERENCE_STEPS=("INT32", [3]),
        GUIDANCE_SCALE=("FP32", [3.1]),
        DURATION=("FP32", [0.5]),
        SCHEDULER=("BYTES", ["ddim"]),
    )
    result = client.infer("tango", inputs, outputs=[triton.InferRequestedOutput("AUDIO")])
    options: dict[str, Any] = {
        "negative_prompt": "rain",
        "seed": 2**62 + 1,
        "num_inference_steps": 3,
        "guidance_scale": 3.1,
        "duration": 0.5,
        "scheduler": "ddim",
    }
    assert result.as_numpy("AUDIO").tobytes() == _native(served, PROMPTS[0], **options)
    assert result.as_numpy("SEED") is None


def test_without_a_seed_one_is_drawn_for_each_row_and_named(client: triton.InferenceServerClient) -> None:
    first = client.infer("tango", _inputs([PROMPTS[0]] * 2))
    seeds = first.as_numpy("SEED")
    assert seeds[0] != seeds[1]
    again = client.infer("tango", _inputs([PROMPTS[0]] * 2, SEED=("INT64", seeds)))
    np.testing.assert_array_equal(first.as_numpy("AUDIO"), again.as_numpy("AUDIO"))


def test_one_value_does_for_all_rows_and_warnings_arrive(client: triton.InferenceServerClient) -> None:
    result = client.infer("tango", _inputs(["a xylophone", "a zither"], SEED=("INT64", [7])))
    assert result.as_numpy("SEED").tolist() == [7, 7]
    first, second = parameters(result)["warnings"].split("\n")
    assert "xylophone" in first
    assert "zither" in second


def test_typed_contents(served: Serving) -> None:
    kind = pb.ModelInferRequest.InferInputTensor
    prompt, seed = (
        kind(name="PROMPT", datatype="BYTES", shape=[1]),
        kind(name="SEED", datatype="INT64", shape=[1]),
    )
    prompt.contents.bytes_contents.append(PROMPTS[0].encode())
    seed.contents.int64_contents.append(7)
    with grpc.insecure_channel(served.target) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        response = stub.ModelInfer(pb.ModelInferRequest(model_name="tango", inputs=[prompt, seed]))
    assert [one.name for one in response.outputs] == ["AUDIO", "SAMPLE_RATE", "SEED", "DIGEST"]
    assert response.raw_output_contents[0] == _native(served, PROMPTS[0], seed=7)


def test_a_stream_tells_progress_and_gives_each_clip(
    client: triton.InferenceServerClient, served: Serving
) -> None:
    with _stream(client) as stream:
        client.async_stream_infer("tango", _inputs(SEED=("INT64", [7, 8])), request_id="mine")
        results = stream.until_final()
    assert {result.get_response().id for result in results} == {"mine"}
    assert all(IDENTITY.items() <= parameters(result).items() for result in results)
    clips = [result for result in results if result.as_numpy("AUDIO") is not None]
    assert results[-1] is clips[-1]
    for clip in clips:
        row = _row(clip)
        assert clip.as_numpy("AUDIO").shape == (1, 10_240)
        assert clip.as_numpy("SEED").tolist() == [7 + row]
        assert clip.as_numpy("AUDIO").tobytes() == _native(served, PROMPTS[row], seed=7 + row)
    for row in range(2):
        told = [one for one in results if one not in clips and _row(one) == row]
        fractions = [float(one.as_numpy("PROGRESS")[0]) for one in told]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
        assert [parameters(one).get("step", 0) for one in told[-4:]] == [1, 2, 3, 4]


def test_requests_of_one_stream_are_answered_side_by_side(client: triton.InferenceServerClient) -> None:
    with _stream(client) as stream:
        long, short = (_inputs(PROMPTS[:1], NUM_INFERENCE_STEPS=("INT32", [n])) for n in (60, 2))
        client.async_stream_infer("tango", long, request_id="long")
        client.async_stream_infer("tango", short, request_id="short")
        client.async_stream_infer("tango", _inputs([""]), request_id="bad")
        finals: list[str] = []
        while len(finals) < 3:
            result, error = stream.answers.get(timeout=60)
            if error is not None:
                assert error.message().startswith("prompt: is empty")
                finals.append("bad")
            elif parameters(result)["triton_final_response"]:
                finals.append(result.get_response().id)
    assert set(finals[:2]) == {"bad", "short"}


def test_a_stream_ends_with_a_status_where_it_is_asked_to(client: triton.InferenceServerClient) -> None:
    with _stream(client, headers={"triton_grpc_error": "true"}) as stream:
        client.async_stream_infer("tango", _inputs([""]))
        status, message = refusal(stream.get)
    assert status == "INVALID_ARGUMENT"
    assert message.startswith("prompt: is empty")


async def test_asyncio(served: Serving) -> None:
    async with triton_aio.InferenceServerClient(served.target) as client:
        assert await client.is_model_ready("tango")
        inputs = _inputs(SEED=("INT64", [7]))
        one, other = await asyncio.gather(client.infer("tango", inputs), client.infer("tango", inputs))
        np.testing.assert_array_equal(one.as_numpy("AUDIO"), other.as_numpy("AUDIO"))

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "tango", "inputs": inputs, "request_id": "1"}

        clips: dict[int, Any] = {}
        async for result, error in client.stream_infer(requests()):
            assert error is None
            if result.as_numpy("AUDIO") is not None:
                clips[_row(result)] = result.as_numpy("AUDIO")
        np.testing.assert_array_equal(np.concatenate([clips[0], clips[1]]), one.as_numpy("AUDIO"))


LONG = {"NUM_INFERENCE_STEPS": ("INT32", [1000])}


def test_a_request_that_is_cancelled_frees_its_places(
    client: triton.InferenceServerClient, served: Serving
) -> None:
    outcome: queue.Queue[Any] = queue.Queue()
    call = client.async_infer("tango", _inputs(**LONG), lambda result, error: outcome.put(error))
    until(lambda: served.engine.stats.running == 2)
    call.cancel()
    assert "CANCELLED" in outcome.get(timeout=10).status()
    until(lambda: served.engine.stats.running == 0)


def test_a_stream_that_is_cancelled_frees_its_places(
    client: triton.InferenceServerClient, served: Serving
) -> None:
    with _stream(client) as stream:
        client.async_stream_infer("tango", _inputs(**LONG))
        stream.get()
    until(lambda: served.engine.stats.running == 0)


def test_a_deadline_frees_its_places(client: triton.InferenceServerClient, served: Serving) -> None:
    status, _ = refusal(lambda: client.infer("tango", _inputs(**LONG), client_timeout=0.3))
    assert status == "DEADLINE_EXCEEDED"
    until(lambda: served.engine.stats.running == 0)


def test_a_full_queue_is_unavailable_and_nothing_of_it_stays() -> None:
    with (
        tiny_engine(batch_shapes=(1,), max_queue=2, max_clip_count=2) as engine,
        serving(engine) as served,
        triton.InferenceServerClient(served.target) as client,
        _stream(client) as stream,
    ):
        client.async_stream_infer("tango", _inputs(PROMPTS[:1], **LONG))
        while stream.get().as_numpy("PROGRESS")[0] == 0:
            pass
        client.async_stream_infer("tango", _inputs(PROMPTS[:1], **LONG))
        until(lambda: engine.stats.queue_depth == 1)
        # One row would fit, two do not.
        status, message = refusal(lambda: client.infer("tango", _inputs()))
        assert status == "UNAVAILABLE"
        assert "queue" in message
        until(lambda: engine.stats.running == 2)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "prompt: tensor PROMPT is missing, expected BYTES [n]"),
        (_inputs([]), "prompt: tensor PROMPT has 0 rows, expected between 1 and 8"),
        (_inputs(["a"] * 9), "prompt: tensor PROMPT has 9 rows, expected between 1 and 8"),
        (_inputs([["a dog"]]), "prompt: tensor PROMPT has shape [1, 1], expected BYTES [n]"),
        (_inputs([b"\xff"]), "prompt: tensor PROMPT is not UTF-8 from byte 0 on"),
        (_inputs(["a dog", "\x07"]), "prompt[1]: "),
        (_inputs(SEED=("INT32", [1])), "seed: tensor SEED has datatype INT32, expected INT64 [n]"),
        (
            _inputs(SEED=("INT64", [1, 2, 3])),
            "seed: tensor SEED has 3 rows, expected 2, as many as PROMPT, or 1",
        ),
        (_inputs(PROMPTS[:1], SEED=("INT64", [-1])), "seed: is -1, must be between 0 and"),
        (_inputs(PROMPTS[:1], NUM_INFERENCE_STEPS=("INT32", [0])), "num_inference_steps: is 0, must be"),
        (_inputs(PROMPTS[:1], GUIDANCE_SCALE=("FP32", [float("nan")])), "guidance_scale: is nan, must be"),
        (
            _inputs(PROMPTS[:1], GUIDANCE_STOP=("FP32", [1.5])),
            "guidance_stop: is 1.5, must be between 0 and 1",
        ),
        (_inputs(PROMPTS[:1], DURATION=("FP32", [1e38])), "duration: is 1e+38 s, must be between"),
        (
            _inputs(DURATION=("FP32", [0.5, 1.0])),
            "duration: tensor DURATION has the values 0.5, 1.0, expected one",
        ),
        (_inputs(PROMPTS[:1], SCHEDULER=("BYTES", ["euler"])), "scheduler: is 'euler', must be one of"),
        (
            _inputs(PROFILE=("BYTES", ["draft", "best"])),
            "profile[1]: is 'best', must be one of quality, draft",
        ),
        (_inputs(AUDIO=("FP32", [[0.0]])), "inputs: have an unknown tensor 'AUDIO', expected some of PROMPT"),
    ],
)
def test_bad_input(client: triton.InferenceServerClient, inputs: list[Any], says: str) -> None:
    status, message = refusal(lambda: client.infer("tango", inputs))
    assert status == "INVALID_ARGUMENT"
    assert message.startswith(says)
    with _stream(client) as stream:
        client.async_stream_infer("tango", inputs)
        with pytest.raises(triton.InferenceServerException) as caught:
            stream.get()
        assert caught.value.message() == message


def test_violations_travel_as_those_of_the_native_api(served: Serving) -> None:
    with grpc.insecure_channel(served.target) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        tensors = _inputs([""], NUM_INFERENCE_STEPS=("INT32", [0]), GUIDANCE_SCALE=("FP32", [-1.0]))
        request = pb.ModelInferRequest(
            model_name="tango",
            inputs=[one._get_tensor() for one in tensors],
            raw_input_contents=[one._get_content() for one in tensors],
        )
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
    error: Any = caught.value
    bad_request = error_details_pb2.BadRequest()
    assert any(
        one.Unpack(bad_request)
        for one in rpc_status.from_call(error).details
        if one.Is(bad_request.DESCRIPTOR)
    )
    fields = {violation.field for violation in bad_request.field_violations}
    assert fields == {"prompt", "num_inference_steps", "guidance_scale"}


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [("another", "", "'another' is not found"), ("tango", "9", "'tango' version 9 is not found")],
)
def test_what_is_not_served_is_not_found(
    client: triton.InferenceServerClient, name: str, version: str, says: str
) -> None:
    for call in (
        lambda: client.infer(name, _inputs(), version),
        lambda: client.get_model_metadata(name, version),
        lambda: client.get_model_config(name, version),
        lambda: client.get_inference_statistics(name, version),
    ):
        status, message = refusal(call)
        assert status == "NOT_FOUND"
        assert f"Request for unknown model: {says}" in message


def test_what_is_not_offered_says_so(client: triton.InferenceServerClient) -> None:
    shared = triton.InferInput("PROMPT", [1], "BYTES")
    shared.set_shared_memory("region", 64)
    written = triton.InferRequestedOutput("AUDIO")
    written.set_shared_memory("region", 64)
    classes = triton.InferRequestedOutput("AUDIO", class_count=1)
    for call in (
        lambda: client.infer("tango", [shared]),
        lambda: client.infer("tango", _inputs(), outputs=[written]),
        lambda: client.infer("tango", _inputs(), outputs=[classes]),
        client.get_system_shared_memory_status,
        lambda: client.register_system_shared_memory("region", "/key", 64),
        client.unregister_system_shared_memory,
        client.get_cuda_shared_memory_status,
        lambda: client.register_cuda_shared_memory("region", b"", 0, 64),
        client.unregister_cuda_shared_memory,
        client.get_trace_settings,
        client.get_log_settings,
    ):
        status, message = refusal(call)
        assert status == "UNIMPLEMENTED"
        assert " " in message
    with pytest.raises(triton.InferenceServerException, match="some of AUDIO, SAMPLE_RATE"):
        client.infer("tango", _inputs(), outputs=[triton.InferRequestedOutput("FOO")])


def test_parameters_of_a_request_are_honoured_or_refused(client: triton.InferenceServerClient) -> None:
    plain = client.infer("tango", _inputs(PROMPTS[:1], SEED=("INT64", [7])))
    same = client.infer(
        "tango", _inputs(PROMPTS[:1], SEED=("INT64", [7])), priority=2, timeout=100_000_000, sequence_id=0
    )
    np.testing.assert_array_equal(plain.as_numpy("AUDIO"), same.as_numpy("AUDIO"))
    for options, says in (
        ({"parameters": {"seed": 7}}, "parameters.seed: is '7', but this option is a tensor; send SEED"),
        ({"parameters": {"temperature": 0.5}}, "parameters.temperature: is unknown"),
        ({"priority": 9}, "parameters.priority: is '9', must be"),
        ({"sequence_id": 7}, "parameters.sequence_id: is '7', but requests are independent"),
    ):
        status, message = refusal(partial(client.infer, "tango", _inputs(PROMPTS[:1]), **options))
        assert (status, says in message) == ("INVALID_ARGUMENT", True), message
    long = _inputs(PROMPTS[:1], NUM_INFERENCE_STEPS=("INT32", [1000]))
    status, message = refusal(lambda: client.infer("tango", long, timeout=1))
    assert (status, "the timeout of the request's parameter passed" in message) == (
        "DEADLINE_EXCEEDED",
        True,
    ), message


def test_statistics_count_rows_requests_and_failures() -> None:
    with (
        tiny_engine() as engine,
        serving(engine) as served,
        triton.InferenceServerClient(served.target) as client,
    ):
        (fresh,) = client.get_inference_statistics("tango").model_stats
        assert (fresh.name, fresh.version, fresh.inference_count) == ("tango", "1", 0)
        begun = time.time_ns() // 1_000_000
        client.infer("tango", _inputs())
        refusal(lambda: client.infer("tango", _inputs([""])))
        (stats,) = client.get_inference_statistics().model_stats
    assert (stats.inference_count, stats.execution_count) == (2, 1)
    assert (stats.inference_stats.success.count, stats.inference_stats.fail.count) == (1, 1)
    assert 0 < stats.inference_stats.compute_infer.ns < stats.inference_stats.success.ns
    assert begun <= stats.last_inference <= time.time_ns() // 1_000_000


def test_a_server_that_drains_is_live_and_not_ready() -> None:
    with (
        tiny_engine() as engine,
        serving(engine, drain_delay_seconds=3600) as served,
        triton.InferenceServerClient(served.target) as client,
    ):
        drain = asyncio.run_coroutine_threadsafe(served.server.drain(), served.loop)
        until(lambda: not client.is_server_ready())
        assert client.is_server_live()
        assert not client.is_model_ready("tango")
        drain.cancel()


def _load(model: ResolvedModel) -> Engine:
    config = EngineConfig(threads=1, batch_shapes=(1,))
    return Engine(load_tango(model.folder), config, model.identity)


def _config(uri: str) -> str:
    return json.dumps({"parameters": {"model_uri": {"string_value": uri}}})


def test_load_switches_the_model_for_the_bearer_of_the_token(tmp_path: Path) -> None:
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "second")
    digest = write_manifest(tmp_path / "second", name="second", version="2", license="Apache-2.0").digest
    config = _config(f"file:{tmp_path / 'second'}")
    with (
        tiny_engine(batch_shapes=(1,)) as engine,
        serving(engine, token=TOKEN, load=_load) as served,
        triton.InferenceServerClient(served.target) as client,
    ):
        headers = {"authorization": f"Bearer {TOKEN}"}
        for wrong in (None, {"authorization": "Bearer another"}):
            status, message = refusal(partial(client.load_model, "tango", headers=wrong, config=config))
            assert (status, "operator's token" in message) == ("UNAUTHENTICATED", True)
            assert refusal(partial(client.unload_model, "tango", headers=wrong))[0] == "UNAUTHENTICATED"
        for refused, code, says in (
            (_config("nonsense"), "INVALID_ARGUMENT", "model_uri: is 'nonsense'"),
            (_config(f"file:{tmp_path / 'absent'}"), "NOT_FOUND", "is no folder"),
            (_config("mini:clap-a"), "INVALID_ARGUMENT", "model_index.json"),
            ('{"name": "tango"}', "INVALID_ARGUMENT", "model_uri: is missing in `config`"),
            ("[" * 100_000, "INVALID_ARGUMENT", "model_uri: is missing in `config`"),
        ):
            status, message = refusal(partial(client.load_model, "tango", headers=headers, config=refused))
            assert (status, says in message) == (code, True)
        files = {"file:1/model.py": b""}
        assert refusal(lambda: client.load_model("tango", headers, config, files))[0] == "UNIMPLEMENTED"
        assert refusal(lambda: client.load_model("another", headers, config))[0] == "NOT_FOUND"
        client.load_model("tango", headers=headers)
        assert client.is_model_ready("tango", "1")

        with _stream(client) as stream:
            client.async_stream_infer("tango", _inputs(PROMPTS[:1], NUM_INFERENCE_STEPS=("INT32", [40])))
            while stream.get().as_numpy("PROGRESS")[0] == 0:
                pass
            client.load_model("tango", headers=headers, config=config)
            after = client.infer("tango", _inputs(PROMPTS[:1], SEED=("INT64", [7])))
            begun = stream.until_final()[-1]
        assert parameters(begun).items() >= IDENTITY.items()
        assert parameters(after) == {"name": "second", "version": "2", "digest": digest}
        assert after.get_response().model_version == "2"
        assert after.as_numpy("AUDIO").tobytes() == _native(served, PROMPTS[0], seed=7)
        assert not client.is_model_ready("tango", "1")
        assert list(client.get_model_metadata("tango").versions) == ["2"]
        counted = {s.version: s.inference_count for s in client.get_inference_statistics().model_stats}
        assert counted == {"1": 1, "2": 1}
        status, message = refusal(lambda: client.unload_model("tango", headers=headers))
        assert (status, "load another version, which unloads this one" in message) == ("UNIMPLEMENTED", True)
        served.run(served.slot.close())


def test_load_is_off_without_a_token() -> None:
    with (
        tiny_engine() as engine,
        serving(engine) as served,
        triton.InferenceServerClient(served.target) as client,
    ):
        status, message = refusal(lambda: client.load_model("tango", config=_config("mini")))
        assert (status, "is disabled" in message) == ("UNIMPLEMENTED", True)
        assert refusal(lambda: client.unload_model("tango"))[0] == "UNIMPLEMENTED"


def test_the_example(
    served: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.wav"
    arguments = ["example", PROMPTS[0], "--url", served.target, "--out", str(out), "--steps", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    example = Path(__file__).parents[3] / "examples/tritonclient_generate.py"
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(example), run_name="__main__")
    assert caught.value.code == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}  version 1, {MODEL.digest}\n"
    assert "100%" in printed.err
    with wave.open(io.BytesIO(out.read_bytes())) as file:
        assert (file.getframerate(), file.getnframes()) == (16_000, 10_240)
        samples = np.frombuffer(file.readframes(10_240), dtype="<i2")
    native = np.frombuffer(_native(served, PROMPTS[0], seed=7, num_inference_steps=4), dtype="<f4")
    np.testing.assert_array_equal(samples, np.rint(native * 32767).astype("<i2"))
