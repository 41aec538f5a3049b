"""Parameters of a request, of its inputs and of its outputs: honoured, or refused by name.

No parameter is ignored: a caller would take an option that was never read for one that was used.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from tritonclient.grpc import service_pb2 as pb

from services.errors import DeadlineExceededError, FieldViolation, InvalidInputError
from services.inference.model import Caller
from services.inference.tensors import SHARED_MEMORY, TensorSpec, shortened
from services.runtime.callers import calling, current_caller

PRIORITIES: Final = (0, 1, 2)
"""Values of `priority`: the call's own (0, 1), and batch."""
BATCH: Final = 2

_KNOWN: Final = ("priority", "timeout")
_SEQUENCES: Final = ("sequence_id", "sequence_start", "sequence_end")
_EMPTY_FINAL: Final = "triton_enable_empty_final_response"
"""Sent by clients of streams; here the last response says that it is the last, with or without it."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOptions:
    """Options of one request."""

    batch: bool = False
    """Whether it may wait while others' interactive requests are served."""
    deadline: float | None = None
    """On the clock of `time.monotonic`, from the request's own timeout; None without one."""

    def calling(self) -> AbstractContextManager[None]:
        """Return a context with the request's priority class and deadline.

        No request is raised above its call's class, or has more time than its call.
        """
        caller = current_caller()
        deadline = min((one for one in (self.deadline, caller.deadline) if one is not None), default=None)
        return calling(
            replace(caller, priority="batch" if self.batch else caller.priority, deadline=deadline)
        )

    def time_remaining(self, seconds: float | None) -> float | None:
        """Return the time left, of a call with `seconds` left; None without limit."""
        own = None if self.deadline is None else self.deadline - time.monotonic()
        return min((one for one in (own, seconds) if one is not None), default=None)

    async def limited(self, values: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """Yield `values` until the deadline. Raises `DeadlineExceededError` then."""
        while True:
            try:
                async with asyncio.timeout(self.time_remaining(None)) as scope:
                    value = await anext(values)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                if not scope.expired():
                    raise
                raise DeadlineExceededError(
                    "the timeout of the request's parameter passed before it was done; give a longer one"
                ) from error
            yield value


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitedCaller:
    """The `Caller` of a request with options, in a call or under Triton."""

    options: RequestOptions
    context: Caller | None = None
    """The call; None under Triton, which turns a call's deadline into a cancellation."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the earlier deadline; None without one."""
        return self.options.time_remaining(None if self.context is None else self.context.time_remaining())


def read_options(request: pb.ModelInferRequest, inputs: Sequence[TensorSpec]) -> RequestOptions:
    """Return the options of a request.

    Raises:
        InvalidInputError: parameters are unknown, or have a wrong value; lists every violation. Those of
            shared memory and of classification are left to `read_inputs` and `read_requested_outputs`.
    """
    given = {name: _value(one) for name, one in request.parameters.items()}
    tensors = [("inputs", one) for one in request.inputs] + [("outputs", one) for one in request.outputs]
    faults = [
        FieldViolation(
            f"{side}.{shortened(tensor.name)}.parameters.{shortened(name)}",
            "is unknown here; tensors have no parameters, leave it out",
        )
        for side, tensor in tensors
        for name in tensor.parameters
        if not name.startswith(SHARED_MEMORY) and not (side == "outputs" and name == "classification")
    ]
    return options_of(given, inputs, faults)


def options_of(
    given: Mapping[str, Any], inputs: Sequence[TensorSpec], faults: Sequence[FieldViolation] = ()
) -> RequestOptions:
    """Return the options in the parameters of a request. Raises `InvalidInputError`, with `faults` too."""
    found = [*_faults(given, {spec.field: spec for spec in inputs}), *faults]
    if found:
        raise InvalidInputError(*found)
    microseconds = given.get("timeout", 0)
    return RequestOptions(
        batch=given.get("priority", 0) == BATCH,
        deadline=time.monotonic() + microseconds / 1e6 if microseconds else None,
    )


def _faults(given: Mapping[str, Any], inputs: Mapping[str, TensorSpec]) -> Iterator[FieldViolation]:
    for name, value in given.items():
        if fault := _fault(name, value, inputs):
            yield FieldViolation(f"parameters.{shortened(name)}", fault)


def _fault(name: str, value: Any, inputs: Mapping[str, TensorSpec]) -> str | None:
    """Return what is wrong with one parameter, and the remedy."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    about = f"is {str(value)[:40]!r}"
    if name == "priority":
        valid = is_whole and value in PRIORITIES
        return None if valid else f"{about}, must be 0 or 1 (the call's own priority) or 2 (batch)"
    if name == "timeout":
        return None if is_whole and value >= 0 else f"{about}, must be microseconds, 0 or more; 0 is none"
    if name in _SEQUENCES:
        fault = f"{about}, but requests are independent and models have no sequences; leave it out"
        return fault if value else None
    if name == _EMPTY_FINAL:
        return None if isinstance(value, bool) else f"{about}, must be true or false"
    if spec := inputs.get(name.lower()):
        return f"{about}, but this option is a tensor; send {spec.name}, {spec.expected}"
    return f"is unknown; known parameters of a request are {' and '.join(_KNOWN)}"


def _value(parameter: Any) -> Any:
    """Return the value of a parameter; None if it is empty."""
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)
