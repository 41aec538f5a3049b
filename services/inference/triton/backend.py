"""Run a model of the Open Inference Protocol in the Python backend of a Triton server.

`model.py` of a version folder defines::

    TritonPythonModel = python_model(open_model)

Requests run concurrently on the model's own event loop, with the same `Model` as in the service. Imported
only in Triton's processes for Python models, which provide `pb_utils`.
"""

import asyncio
import json
import os
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
from services.inference import Model, ModelLease, Response, Tensors
from services.inference.options import LimitedCaller, options_of
from services.inference.tensors import check_inputs
from services.runtime import status
from services.runtime.logs import configure_logs
from services.runtime.server import FAILURE_GRACE_SECONDS

log = structlog.get_logger()

CANCEL_SECONDS: Final = 0.01
"""Interval of checks for cancelled requests: shorter than a denoising step of any model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in memory, and the function that frees it."""

    model: Model
    close: Callable[[], Awaitable[None]]
    """Cancel running requests, and free the weights."""
    watch: Callable[[Callable[[str], None]], None] = lambda _: None
    """See `services.runtime.serving.Service.watch`."""


OpenModel = Callable[[Path, Mapping[str, str]], Awaitable[LoadedModel]]
"""Load the weights of a version folder, with the parameters of config.pbtxt.

Raises `MilongaError`, whose message Triton reports as the reason why the version is not ready.
"""


class PythonModel:
    """One version of a model, in a separate process that Triton starts."""

    def __init__(self, open_model: OpenModel) -> None:
        self._open = open_model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="model", daemon=True)
        self._running: dict[Any, asyncio.Task[None]] = {}

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the weights. An exception makes Triton refuse the version."""
        import triton_python_backend_utils as pb_utils

        quiet_libraries(online=False)
        configure_logs("json", "info")
        self._pb_utils = pb_utils
        # Triton 2.51's backend has no response parameters; newer ones have.
        self._has_parameters = "parameters" in (pb_utils.InferenceResponse.__init__.__doc__ or "")
        config = json.loads(args["model_config"])
        parameters = {name: one["string_value"] for name, one in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self._thread.start()
        self._loaded: LoadedModel = self._run(self._open(folder, parameters))
        self._watch = self._run(self._start_watching())
        self._loaded.watch(_end_process)
        self._decoupled = self._loaded.model.decoupled

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Run requests: return their responses, or, if the model is decoupled, send them as they arrive."""
        if self._decoupled:
            for request in requests:
                sender = request.get_response_sender()
                self._loop.call_soon_threadsafe(self._begin, request, sender)
            return None
        responses: list[Any] = self._run(self._respond_all(requests))
        return responses

    def finalize(self) -> None:
        """Free the weights. Triton calls this after every request has its responses."""
        self._loop.call_soon_threadsafe(self._watch.cancel)
        self._run(self._loaded.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, work: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result()

    async def _respond_all(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request. Concurrent requests share the model's own batches."""
        return list(await asyncio.gather(*(self._respond(request) for request in requests)))

    async def _respond(self, request: Any) -> Any:
        try:
            with self._loaded.model.lease() as lease:
                (response,) = [one async for one in self._responses(request, lease, stream=False)]
                return self._encode(request, lease, response)
        except Exception as error:
            return self._failure(request, error)

    def _begin(self, request: Any, sender: Any) -> None:
        task = asyncio.create_task(self._stream(request, sender))
        self._running[sender] = task
        task.add_done_callback(lambda ended: self._ended(ended, sender))

    def _ended(self, task: "asyncio.Task[None]", sender: Any) -> None:
        del self._running[sender]
        if task.cancelled():  # before it started
            self._end(sender, self._cancellation())

    async def _stream(self, request: Any, sender: Any) -> None:
        final = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            with self._loaded.model.lease() as lease:
                requested = frozenset(request.requested_output_names())
                async with aclosing(self._responses(request, lease, stream=True)) as responses:
                    async for response in responses:
                        if response.is_sent(requested):
                            encoded = self._encode(request, lease, response)
                            sender.send(encoded, final if response.final else 0)
        except asyncio.CancelledError:
            self._end(sender, self._cancellation())
        except Exception as error:
            self._end(sender, self._failure(request, error))

    def _cancellation(self) -> Any:
        error = self._pb_utils.TritonError("the caller cancelled", self._pb_utils.TritonError.CANCELLED)
        return self._pb_utils.InferenceResponse(error=error)

    def _end(self, sender: Any, response: Any) -> None:
        """Send the last response; log an error if Triton does not accept it any more."""
        try:
            sender.send(response, self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            log.error("answer", exc_info=error)

    async def _responses(self, request: Any, lease: ModelLease[Any], *, stream: bool) -> Any:
        model = self._loaded.model
        options = options_of(self._parameters(request), model.inputs)
        tensors = await asyncio.to_thread(self._read, request)
        check_inputs(tensors, model.inputs, model.max_rows)
        with options.calling():
            job = await asyncio.to_thread(lease.read, tensors)
            del tensors
            running = lease.run(job, LimitedCaller(options=options), stream=stream)
            del job  # its clips are not needed once they are decoded
            async with aclosing(running), aclosing(options.limited(running)) as responses:
                async for response in responses:
                    yield response

    def _parameters(self, request: Any) -> dict[str, Any]:
        """Return a request's parameters. Triton keeps those that it knows apart; the priority is its own."""
        given = json.loads(request.parameters() or "null") or {}
        return {**given, "timeout": request.timeout(), "sequence_id": request.correlation_id()}

    def _read(self, request: Any) -> Tensors:
        # Copied: Triton reuses the memory after the last response.
        return {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}

    def _encode(self, request: Any, lease: ModelLease[Any], response: Response) -> Any:
        requested = request.requested_output_names()
        tensors = [
            self._pb_utils.Tensor(name, values)
            for name, values in response.outputs.items()
            if name in requested
        ]
        if not self._has_parameters:
            return self._pb_utils.InferenceResponse(tensors)
        merged = {**lease.parameters, **response.parameters}
        # Triton has no float parameters.
        parameters = {name: str(one) if isinstance(one, float) else one for name, one in merged.items()}
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
        """Cancel requests whose caller has cancelled."""
        while True:
            await asyncio.sleep(CANCEL_SECONDS)
            for sender, task in tuple(self._running.items()):
                try:
                    if not task.done() and not task.cancelling() and sender.is_cancelled():
                        task.cancel()
                except Exception as error:  # from Triton; continue with the other requests
                    log.error("cancellation", exc_info=error)


def _end_process(reason: str) -> None:
    """End this process, after the requests have had their errors. The liveness probe then restarts Triton."""
    log.critical("failed", reason=reason)
    timer = threading.Timer(FAILURE_GRACE_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()


def python_model(open_model: OpenModel) -> type:
    """Return the class `TritonPythonModel` for `model.py`."""

    class TritonPythonModel(PythonModel):
        def __init__(self) -> None:
            super().__init__(open_model)

    return TritonPythonModel
