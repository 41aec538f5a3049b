"""What services count and measure of calls, queues and models."""

import asyncio
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch
import tritonclient.grpc as triton

from milonga import AudioClient
from milonga.v1 import audio_pb2, reward_pb2
from services.errors import QueueFullError
from services.runtime.gpu_memory import GpuMemory, gpu_memory, memory_metrics
from services.runtime.metrics import ServerMetrics
from services.runtime.microbatching import MicroBatcher
from tests.services.generation.serving import Serving, serving, tiny_engine
from tests.services.inference.asking import tensor
from tests.services.reward.serving import float32, tone
from tests.services.reward.serving import serving as serving_reward
from tests.services.runtime.answering import GENERATE, SWITCH, answering
from tests.tiny import tiny_clap, tiny_reward
from tests.waiting import until

SHORT: Any = {"duration": 0.64, "num_inference_steps": 2}
LONG: Any = {"num_inference_steps": 1000}


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    """Return a sample's value; 0 if there is none."""
    return metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("seconds", "timeout", "code", "least", "most"),
    [(0.0, 45.0, "OK", 10.0, 50.0), (600.0, 2.0, "DEADLINE_EXCEEDED", None, 0.5)],
)
async def test_the_slack_of_calls_with_a_deadline_is_measured(
    seconds: float, timeout: float, code: str, least: float | None, most: float
) -> None:
    async with answering(seconds=seconds) as service:
        await service.channel.channel_ready()
        rpc: Any = service.channel.unary_unary(GENERATE)
        call = rpc(b"x", timeout=timeout)
        assert (await call.code()).name == code

        def within(bound: float) -> float:
            labels = {"rpc": "GenerateAudio", "code": code, "le": str(bound)}
            return value(service.metrics, "milonga_deadline_slack_seconds_bucket", **labels)

        await service.count(GENERATE, code)
        assert within(most) == 1
        assert least is None or within(least) == 0


async def test_calls_without_a_deadline_have_no_slack() -> None:
    async with answering() as service:
        rpc: Any = service.channel.unary_unary(GENERATE)
        await rpc(b"x")
        await service.count(GENERATE, "OK")
        labels = {"rpc": "GenerateAudio", "code": "OK"}
        assert value(service.metrics, "milonga_deadline_slack_seconds_count", **labels) == 0


async def test_a_call_without_a_token_is_a_refusal() -> None:
    async with answering(operator_token="a" * 32) as service:
        assert await service.code(SWITCH) is grpc.StatusCode.UNAUTHENTICATED
        await service.count(SWITCH, "UNAUTHENTICATED")
        assert value(service.metrics, "milonga_refusals_total", rpc="SwitchModel", reason="token") == 1


@contextmanager
def full() -> Iterator[Serving]:
    """Serve an engine that has room for no further clip."""
    with (
        tiny_engine(batch_shapes=(1,), max_queue=1, max_clip_count=1) as engine,
        serving(engine) as served,
        AudioClient(served.target, retries=0) as client,
    ):
        running, waiting = client.stream("rain", **LONG), client.stream("rain", **LONG)
        next(running)
        next(waiting)
        yield served


def test_a_full_queue_is_a_refusal_also_within_a_stream() -> None:
    with (
        full() as served,
        AudioClient(served.target, retries=0) as client,
        triton.InferenceServerClient(served.target) as streaming,
    ):
        with pytest.raises(QueueFullError):
            client.generate("rain", **LONG)
        answers: queue.Queue[Any] = queue.Queue()
        streaming.start_stream(lambda result, error: answers.put(error))
        streaming.async_stream_infer("tango", [tensor("PROMPT", "BYTES", [b"rain"])])
        assert "queue" in str(answers.get(timeout=60))
        streaming.stop_stream()
        rpcs = ("GenerateAudio", "ModelStreamInfer")
        name = "milonga_refusals_total"
        until(lambda: [value(served.metrics, name, rpc=rpc, reason="room") for rpc in rpcs] == [1, 1])
        until(lambda: value(served.metrics, "milonga_stream_requests_total", code="UNAVAILABLE") == 1)


def test_requests_of_streams_are_counted_with_their_status() -> None:
    with (
        tiny_engine() as engine,
        serving(engine) as served,
        triton.InferenceServerClient(served.target) as client,
    ):
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error))
        steps = tensor("NUM_INFERENCE_STEPS", "INT32", [2])
        for prompts in ([b"rain"], [b""]):
            client.async_stream_infer("tango", [tensor("PROMPT", "BYTES", prompts), steps])
        client.stop_stream()
        codes = ("OK", "INVALID_ARGUMENT")
        until(
            lambda: [value(served.metrics, "milonga_stream_requests_total", code=c) for c in codes] == [1, 1]
        )


def test_generation_measures_its_queue_steps_and_decodes() -> None:
    with (
        tiny_engine(batch_shapes=(2,)) as engine,
        serving(engine) as served,
        AudioClient(served.target, retries=0) as client,
    ):
        client.generate("rain", **SHORT, clip_count=2, guidance_scale=3.0)

        def count(name: str, **labels: str) -> float:
            return value(served.metrics, f"milonga_{name}_count", queue="engine", **labels)

        until(lambda: count("decode_seconds") == 2)
        assert count("queue_wait_seconds", priority="interactive") == 1
        assert count("first_step_seconds", priority="interactive") == 1
        assert count("step_seconds", rows="4") == 2
        assert count("batch_fill_ratio") == 2
        assert value(served.metrics, "milonga_batch_fill_ratio_sum", queue="engine") == 2.0


def test_reward_measures_its_queue_and_batches() -> None:
    request = reward_pb2.BatchComputeRewardsRequest(
        pairs=[audio_pb2.PromptedClip(prompt="rain", clip=float32(tone(1.0))) for _ in range(4)]
    )
    with serving_reward(tiny_reward(tiny_clap()), max_batch_seconds=8.0) as served:
        served.stub.BatchComputeRewards(request)
        queued = {"queue": "pairs", "priority": "interactive"}
        assert value(served.metrics, "milonga_queue_wait_seconds_count", **queued) == 4
        assert value(served.metrics, "milonga_batch_seconds_count", queue="pairs") == 1
        assert value(served.metrics, "milonga_batch_fill_ratio_sum", queue="pairs") == 0.5


async def test_items_that_leave_the_queue_have_waited_too() -> None:
    seen: list[str] = []
    called, go = threading.Event(), threading.Event()

    def run(items: Sequence[int]) -> Sequence[int]:
        called.set()
        assert go.wait(30)
        return items

    batcher: MicroBatcher[int, int] = MicroBatcher(run, cost=lambda _: 1.0, max_cost=1.0, max_queue_cost=10.0)
    batcher.observe = lambda quantity, value, label="": seen.append(quantity)
    running = asyncio.create_task(batcher.submit([1]))
    assert await asyncio.to_thread(called.wait, 30)
    waiting = asyncio.create_task(batcher.submit([2, 3]))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    go.set()
    assert await running == [1]
    await batcher.close()
    assert seen.count("queue_wait") == 3
    assert seen.count("batch") == 1


# GPU memory


def test_there_is_no_figure_without_a_gpu() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use")
    assert list(gpu_memory()) == []


def test_each_gpu_has_its_figures() -> None:
    gpus = [GpuMemory(device=i, allocated=i + 1, peak=i + 2, reserved=i + 3, total=9) for i in range(2)]
    found = {
        (sample.name, sample.labels["device"]): sample.value
        for metric in memory_metrics(gpus)
        for sample in metric.samples
    }
    assert found["milonga_gpu_memory_allocated_bytes", "0"] == 1
    assert found["milonga_gpu_memory_reserved_bytes", "1"] == 4
    assert len(found) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_the_gpu_is_counted() -> None:
    def allocated() -> float:
        torch.cuda.init()
        (gauge,) = (metric for metric in gpu_memory() if metric.name.endswith("allocated_bytes"))
        return sum(sample.value for sample in gauge.samples)

    first = torch.zeros(2**20, dtype=torch.uint8, device="cuda")
    before = allocated()
    second = torch.zeros(2**24, dtype=torch.uint8, device="cuda")
    assert allocated() - before == second.nbytes
    assert first.nbytes == 2**20
