"""A model of the Open Inference Protocol under the Python backend of a Triton server.

What `model.py` of a version folder makes its `TritonPythonModel` of::

    TritonPythonModel = python_model(open_model)

Requests are answered on an event loop of the model's own, side by side, by the same `Model` that our services
answer the protocol with. Imported within Triton's process for Python models only, which brings `pb_utils`.
"""

import asyncio
import json
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import structlog

from services.environment import quiet_libraries
from services.errors import MilongaError
from services.inference import Leased, Model, Response, Tensors
from services.inference.tensors import check_inputs
from services.runtime import status
from services.runtime.logs import configure_logs

log = structlog.get_logger()

CANCEL_SECONDS: Final = 0.01
"""Between two looks at whether a caller has gone: less than a step of any model takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A model that is loaded."""

    model: Model
    close: Callable[[], Awaitable[None]]
    """Ends what runs, and frees what it holds."""


Open = Callable[[Path, Mapping[str, str]], Awaitable[Opened]]
"""Loads the weights of a version folder, with the parameters of config.pbtxt.

Raises `MilongaError`, of which Triton makes the reason why the version is not ready.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Caller:
    """Whoever sent a request to Triton."""

    microseconds: int

    def time_remaining(self) -> float | None:
        """Triton's own request timeout; a deadline of gRPC shows as a cancellation."""
        return self.microseconds / 1e6 if self.microseconds else None


class PythonModel:
    """One version of a model, in a process of its own that Triton starts."""

    def __init__(self, open_model: Open) -> None:
        self._open = open_model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="model", daemon=True)
        self._live: dict[Any, asyncio.Task[None]] = {}

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the weights. What this raises refuses the version."""
        import triton_python_backend_utils as pb_utils

        quiet_libraries(online=False)
        configure_logs("json", "info")
        self._pb_utils = pb_utils
        # Newer backends take them; the one of 2.51 does not.
        self._has_parameters = "parameters" in (pb_utils.InferenceResponse.__init__.__doc__ or "")
        config = json.loads(args["model_config"])
        parameters = {name: one["string_value"] for name, one in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self._thread.start()
        self._opened: Opened = self._run(self._open(folder, parameters))
        self._watch = self._run(self._start_watching())
        self._decoupled = self._opened.model.decoupled

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests: all of them now, or, if the model is decoupled, each by its sender as it comes."""
        if self._decoupled:
            for request in requests:
                sender = request.get_response_sender()
                self._loop.call_soon_threadsafe(self._begin, request, sender)
            return None
        answers: list[Any] = self._run(self._together(requests))
        return answers

    def finalize(self) -> None:
        """Let go of the weights. Triton waits before this until every request is answered."""
        self._loop.call_soon_threadsafe(self._watch.cancel)
        self._run(self._opened.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, work: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result()

    async def _together(self, requests: Sequence[Any]) -> list[Any]:
        """One answer each; what they ask for meets in the model's own batches."""
        return list(await asyncio.gather(*(self._answer_once(request) for request in requests)))

    async def _answer_once(self, request: Any) -> Any:
        try:
            with self._opened.model.lease() as leased:
                (made,) = [made async for made in self._responses(request, leased, stream=False)]
                return self._response(request, leased, made)
        except Exception as error:
            return self._failure(request, error)

    def _begin(self, request: Any, sender: Any) -> None:
        task = asyncio.create_task(self._stream(request, sender))
        self._live[sender] = task
        task.add_done_callback(lambda ended: self._ended(ended, sender))

    def _ended(self, task: "asyncio.Task[None]", sender: Any) -> None:
        del self._live[sender]
        if task.cancelled():  # before it had begun
            self._end(sender, self._gone())

    async def _stream(self, request: Any, sender: Any) -> None:
        final = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            with self._opened.model.lease() as leased:
                wanted = frozenset(request.requested_output_names())
                async with aclosing(self._responses(request, leased, stream=True)) as responses:
                    async for made in responses:
                        if made.is_sent(wanted):
                            sender.send(self._response(request, leased, made), final if made.final else 0)
        except asyncio.CancelledError:
            self._end(sender, self._gone())
        except Exception as error:
            self._end(sender, self._failure(request, error))

    def _gone(self) -> Any:
        error = self._pb_utils.TritonError("the caller has gone", self._pb_utils.TritonError.CANCELLED)
        return self._pb_utils.InferenceResponse(error=error)

    def _end(self, sender: Any, response: Any) -> None:
        """Send the last answer; it may be that none can be sent any more."""
        try:
            sender.send(response, self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            log.error("answer", exc_info=error)

    async def _responses(self, request: Any, leased: Leased[Any], *, stream: bool) -> Any:
        model = self._opened.model
        tensors = await asyncio.to_thread(self._read, request)
        check_inputs(tensors, model.inputs, model.max_rows)
        job = await asyncio.to_thread(leased.read, tensors)
        async with aclosing(leased.run(job, _Caller(microseconds=request.timeout()), stream=stream)) as made:
            async for response in made:
                yield response

    def _read(self, request: Any) -> Tensors:
        # Copied: the memory is Triton's, and its own again once the request is answered.
        return {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}

    def _response(self, request: Any, leased: Leased[Any], made: Response) -> Any:
        wanted = request.requested_output_names()
        tensors = [
            self._pb_utils.Tensor(name, values) for name, values in made.outputs.items() if name in wanted
        ]
        if not self._has_parameters:
            return self._pb_utils.InferenceResponse(tensors)
        values = {**leased.parameters, **made.parameters}
        # Which knows no numbers with a fraction.
        parameters = {name: str(one) if isinstance(one, float) else one for name, one in values.items()}
        return self._pb_utils.InferenceResponse(tensors, parameters=parameters)

    def _failure(self, request: Any, error: Exception) -> Any:
        code = status.status_code(error, status.INFERENCE_STATUS_CODES)
        identity = request.request_id() or uuid.uuid4().hex
        if not isinstance(error, MilongaError):
            log.error("request", request_id=identity[:80], exc_info=error)
        message = status.to_status(error, identity, status.INFERENCE_STATUS_CODES).message
        return self._pb_utils.InferenceResponse(error=self._pb_utils.TritonError(message, self._code(code)))

    def _code(self, code: grpc.StatusCode) -> Any:
        kinds = self._pb_utils.TritonError
        return {
            grpc.StatusCode.INVALID_ARGUMENT: kinds.INVALID_ARG,
            grpc.StatusCode.NOT_FOUND: kinds.NOT_FOUND,
            grpc.StatusCode.UNAVAILABLE: kinds.UNAVAILABLE,
            grpc.StatusCode.UNIMPLEMENTED: kinds.UNSUPPORTED,
            grpc.StatusCode.CANCELLED: kinds.CANCELLED,
            grpc.StatusCode.DEADLINE_EXCEEDED: kinds.CANCELLED,
        }.get(code, kinds.INTERNAL)

    async def _start_watching(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self._watch_callers())

    async def _watch_callers(self) -> None:
        """Cancel what nobody waits for any more."""
        while True:
            await asyncio.sleep(CANCEL_SECONDS)
            for sender, task in tuple(self._live.items()):
                try:
                    if not task.done() and not task.cancelling() and sender.is_cancelled():
                        task.cancel()
                except Exception as error:  # Triton's; the others are watched on
                    log.error("cancellation", exc_info=error)


def python_model(open_model: Open) -> type:
    """Return the class that Triton looks for in `model.py`."""

    class TritonPythonModel(PythonModel):
        def __init__(self) -> None:
            super().__init__(open_model)

    return TritonPythonModel
