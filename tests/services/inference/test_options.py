"""Parameters of requests: what is honoured, what is refused, and in which words."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from services.errors import DeadlineExceededError, InvalidInputError
from services.generation.inference import INPUTS
from services.inference.options import LimitedCaller, RequestOptions, options_of, read_options
from services.runtime.callers import Caller, calling, current_caller


def faults(call: Any) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        call()
    return {fault.field: fault.description for fault in caught.value.violations}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"priority": 0},
        {"priority": 1},
        {"timeout": 0},
        {"sequence_id": 0, "sequence_start": False, "sequence_end": False},
        {"sequence_id": ""},
        {"triton_enable_empty_final_response": True},
    ],
)
def test_parameters_that_change_nothing_are_accepted(given: dict[str, Any]) -> None:
    assert options_of(given, INPUTS) == RequestOptions()


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("priority", 3, "is '3', must be 0 or 1 (the call's own priority) or 2 (batch)"),
        ("priority", "batch", "is 'batch', must be 0 or 1"),
        ("priority", True, "is 'True', must be 0 or 1"),
        ("timeout", -1, "is '-1', must be microseconds, 0 or more; 0 is none"),
        ("timeout", 0.5, "is '0.5', must be microseconds, 0 or more"),
        ("timeout", None, "is 'None', must be microseconds, 0 or more"),
        ("sequence_id", 7, "is '7', but requests are independent and models have no sequences; leave it out"),
        ("sequence_id", "a", "is 'a', but requests are independent"),
        ("sequence_end", True, "is 'True', but requests are independent"),
        ("triton_enable_empty_final_response", "yes", "is 'yes', must be true or false"),
        ("seed", 7, "is '7', but this option is a tensor; send SEED, INT64 [n], or [1] for all"),
        ("SEED", 7, "is '7', but this option is a tensor; send SEED, INT64 [n], or [1] for all"),
        ("temperature", 0.7, "is unknown; known parameters of a request are priority and timeout"),
        ("triton_secret", 1, "is unknown; known parameters of a request are priority and timeout"),
        ("binary_data_output", True, "is unknown; known parameters of a request are priority and timeout"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(name: str, value: Any, fault: str) -> None:
    found = faults(lambda: options_of({name: value}, INPUTS))
    assert list(found) == [f"parameters.{name}"]
    assert found[f"parameters.{name}"].startswith(fault)


def test_every_fault_of_a_request_and_of_its_tensors_is_named() -> None:
    request = pb.ModelInferRequest(model_name="tango")
    request.parameters["temperature"].double_param = 0.7
    request.parameters["priority"].uint64_param = 9
    request.inputs.add(name="PROMPT").parameters["content_type"].string_param = "str"
    request.outputs.add(name="AUDIO").parameters["binary_data"].bool_param = True
    found = faults(lambda: read_options(request, INPUTS))
    assert set(found) == {
        "parameters.temperature",
        "parameters.priority",
        "inputs.PROMPT.parameters.content_type",
        "outputs.AUDIO.parameters.binary_data",
    }


def test_values_of_every_wire_type_are_read() -> None:
    request = pb.ModelInferRequest(model_name="tango")
    request.parameters["priority"].uint64_param = 2
    request.parameters["timeout"].int64_param = 2_000_000
    options = read_options(request, INPUTS)
    assert options.batch
    assert options.deadline == pytest.approx(time.monotonic() + 2, abs=1)


def test_the_earlier_deadline_counts() -> None:
    class Context:
        def time_remaining(self) -> float:
            return 5.0

    options = RequestOptions(deadline=time.monotonic() + 100)
    assert LimitedCaller(options=options, context=Context()).time_remaining() == 5.0
    assert LimitedCaller(options=options).time_remaining() == pytest.approx(100, abs=1)
    assert LimitedCaller(options=RequestOptions()).time_remaining() is None


def test_a_request_may_be_lowered_to_batch_but_not_raised() -> None:
    with RequestOptions(batch=True).calling():
        assert current_caller().priority == "batch"
    with calling(Caller(priority="batch")), options_of({"priority": 1}, INPUTS).calling():
        assert current_caller().priority == "batch"
    assert current_caller().priority == "interactive"


def test_the_timeout_of_a_request_is_a_deadline_of_its_caller() -> None:
    """Which the queues of scoring and reward admit by."""
    soon, late = time.monotonic() + 1, time.monotonic() + 100
    with RequestOptions(deadline=soon).calling():
        assert current_caller().deadline == soon
    for options, deadline in ((RequestOptions(deadline=late), soon), (RequestOptions(), soon)):
        with calling(Caller(deadline=deadline)), options.calling():
            assert current_caller().deadline == soon
    with RequestOptions().calling():
        assert current_caller().deadline is None


async def test_values_after_the_deadline_are_not_waited_for() -> None:
    ended = asyncio.Event()

    async def values() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.set()

    limited = RequestOptions(deadline=time.monotonic() + 0.05).limited(values())
    assert await anext(limited) == 1
    with pytest.raises(DeadlineExceededError, match="timeout"):
        await anext(limited)
    assert ended.is_set()


async def test_a_timeout_of_the_model_itself_is_not_the_request_s() -> None:
    async def values() -> AsyncIterator[int]:
        raise TimeoutError("of the model")
        yield 1

    with pytest.raises(TimeoutError, match="of the model"):
        await anext(RequestOptions(deadline=time.monotonic() + 60).limited(values()))
