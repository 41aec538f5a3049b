"""The rpcs of GRPCInferenceService: read tensors, run the model, write tensors.

The base class and the messages are tritonclient's, so that no proto file is copied.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import grpc
import structlog
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from services.errors import MilongaError, ModelNotFoundError, UnsupportedError
from services.inference import metadata
from services.inference.model import Context, Model, ModelLease, Operator, Response
from services.inference.options import LimitedCaller, read_options
from services.inference.statistics import Statistics
from services.inference.streams import interleave
from services.inference.tensors import read_inputs, read_requested_outputs, write_outputs
from services.runtime import status
from services.runtime.budget import current_hold
from services.runtime.metrics import ServerMetrics
from services.runtime.offloading import OffLoop
from services.runtime.server import Server

log = structlog.get_logger()

SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

INFER: Final = f"/{SERVICE_NAME}/ModelInfer"
"""Full name of the unary rpc."""

MAX_STREAM_REQUESTS: Final = 64
"""Maximum number of requests of one stream that run at a time; further ones are not read yet."""

_COPIES: Final = 3
"""How many times the tensors of a request are in memory while they are read: as message, arrays and job."""

FINAL: Final = "triton_final_response"
"""Parameter of each response of a stream: whether it is its request's last."""

STATUS_HEADER: Final = "triton_grpc_error"
"""Metadata of a stream. If `true`, an error ends the stream with its status; otherwise it is a response."""


def add_inference(server: Server, model: Model, operator: Operator | None = None) -> None:
    """Add the protocol for `model` to a server. Without an `operator`, no other weights can be loaded."""
    servicer = InferenceServicer(model, operator, server.metrics, ready=lambda: server.ready)
    server.add(SERVICE_NAME, lambda to: rpc.add_GRPCInferenceServiceServicer_to_server(servicer, to))


class InferenceServicer(rpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # a library without types
    """Serves one model. `CallInterceptor` maps exceptions to Triton's statuses."""

    def __init__(
        self, model: Model, operator: Operator | None, metrics: ServerMetrics, *, ready: Callable[[], bool]
    ) -> None:
        self._model, self._operator, self._metrics, self._ready = model, operator, metrics, ready
        self._off_loop = OffLoop()
        self._statistics = Statistics()

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Return that the process is live."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Return whether the server takes requests: not while it drains."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Return whether the model with this name and version takes requests; false for an unknown one."""
        with self._model.lease() as lease:
            served = request.name == self._model.name and request.version in ("", lease.version)
        return pb.ModelReadyResponse(ready=served and self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Return the server's name, version and extensions."""
        return metadata.server_metadata()

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Return the tensors of the model."""
        with self._model.lease() as lease:
            self._check(request.name, request.version, lease)
            return metadata.model_metadata(self._model, lease)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """Return the configuration of the model, as Triton's ModelConfig."""
        with self._model.lease() as lease:
            self._check(request.name, request.version, lease)
            return metadata.model_config(self._model, lease)

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Return the statistics of this protocol's requests; without a name, of the only model."""
        with self._model.lease() as lease:
            if request.name not in ("", self._model.name):
                raise self._not_found(request.name)
            statistics = list(self._statistics.messages(self._model.name, lease.version))
        if request.version:
            statistics = [one for one in statistics if one.version == request.version]
            if not statistics:
                raise self._not_found(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=statistics)

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """Return the only model, with its version."""
        _check_repository(request.repository_name)
        with self._model.lease() as lease:
            return metadata.repository_index(self._model, lease)

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load other weights, as OperatorService.SwitchModel does. Does nothing without a model URI."""
        operator = self._require_operator()
        _check_repository(request.repository_name)
        if request.model_name != self._model.name:
            raise self._not_found(request.model_name)
        uri = metadata.read_load(request)
        if uri is not None:
            await operator.load(uri)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Raise `UnsupportedError`: a service always serves a model."""
        self._require_operator()
        if request.model_name != self._model.name:
            raise self._not_found(request.model_name)
        raise UnsupportedError(
            f"model {self._model.name!r} can't be unloaded, since the service always serves a model; load "
            "another version, which unloads this one after its last call, or stop the service"
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Run one request; return its response."""
        running = self._infer(request, context, stream=False)
        del request  # its tensors are not needed once they are read
        async with aclosing(running) as responses:
            (response,) = [response async for _, response in responses]
        return response

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Run requests concurrently; yield the responses to each request in order."""
        metadata = dict(context.invocation_metadata() or ())
        strict = str(metadata.get(STATUS_HEADER, "")).lower() == "true"

        def respond(request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
            return self._respond(request, context, strict=strict)

        async with aclosing(interleave(request_iterator, respond, MAX_STREAM_REQUESTS)) as responses:
            async for response in responses:
                yield response

    async def SystemSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise _no_shared_memory()

    async def SystemSharedMemoryRegister(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise _no_shared_memory()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise _no_shared_memory()

    async def CudaSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise _no_shared_memory()

    async def CudaSharedMemoryRegister(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise _no_shared_memory()

    async def CudaSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise _no_shared_memory()

    async def TraceSetting(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise UnsupportedError(
            "traces can't be changed at run time; start the service with OTEL_EXPORTER_OTLP_ENDPOINT"
        )

    async def LogSettings(self, request: Any, context: Context) -> Any:
        """Raise `UnsupportedError`."""
        raise UnsupportedError(
            "the log can't be changed at run time; start the service with MILONGA_LOG_LEVEL"
        )

    async def _respond(
        self, request: pb.ModelInferRequest, context: Context, *, strict: bool
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Yield the responses to one request of a stream. Unless `strict`, an error is a response too."""
        code = grpc.StatusCode.CANCELLED
        echo = pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        )
        running = self._infer(request, context, stream=True)
        del request  # its tensors are not needed once they are read
        try:
            async with aclosing(running) as responses:
                async for final, response in responses:
                    response.parameters[FINAL].bool_param = final
                    yield pb.ModelStreamInferResponse(infer_response=response)
            code = grpc.StatusCode.OK
        except Exception as error:
            code = status.status_code(error, status.INFERENCE_STATUS_CODES)
            if strict:
                raise
            self._metrics.count_refusal("ModelStreamInfer", error)
            yield _failed(echo, error)
        finally:
            self._metrics.streamed.labels(code.name).inc()
            current_hold().release()

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context, *, stream: bool
    ) -> AsyncGenerator[tuple[bool, pb.ModelInferResponse], None]:
        """Yield each response to a request that is to be sent, and whether it is the last."""
        with self._model.lease() as lease:
            self._check(request.model_name, request.model_version, lease)
            with self._statistics.measure(lease.version) as record:
                requested, identity = read_requested_outputs(request, self._model.outputs), request.id
                options = read_options(request, self._model.inputs)
                caller = LimitedCaller(context=context, options=options)
                with options.calling():
                    hold, message = current_hold(), current_hold().size
                    hold.resize(_COPIES * message)
                    job = await self._off_loop(partial(self._read, lease, request))
                    del request
                    hold.resize(message)
                    running = lease.run(job, caller, stream=stream)
                    del job  # its clips are not needed once they are decoded
                    async with aclosing(running), aclosing(options.limited(running)) as responses:
                        async for response in responses:
                            record.add(response)
                            if response.is_sent(requested):
                                yield response.final, self._write(identity, lease, response, requested)

    def _read(self, lease: ModelLease[Any], request: pb.ModelInferRequest) -> Any:
        return lease.read(read_inputs(request, self._model.inputs, self._model.max_rows))

    def _write(
        self,
        identity: str,
        lease: ModelLease[Any],
        response: Response,
        requested: frozenset[str],
    ) -> pb.ModelInferResponse:
        message = pb.ModelInferResponse(model_name=self._model.name, model_version=lease.version, id=identity)
        for name, value in {**lease.parameters, **response.parameters}.items():
            match value:
                case bool():
                    message.parameters[name].bool_param = value
                case int():
                    message.parameters[name].int64_param = value
                case float():
                    message.parameters[name].double_param = value
                case str():
                    message.parameters[name].string_param = value
        write_outputs(message, response.outputs, self._model.outputs, requested)
        return message

    def _require_operator(self) -> Operator:
        if self._operator is None:
            raise UnsupportedError(
                "loading and unloading models is disabled: it needs a generation service with an operator's "
                "token"
            )
        return self._operator

    def _check(self, name: str, version: str, lease: ModelLease[Any]) -> None:
        if name != self._model.name:
            raise self._not_found(name)
        if version not in ("", lease.version):
            raise self._not_found(name, version, lease.version)

    def _not_found(self, name: str, version: str = "", served: str = "") -> ModelNotFoundError:
        # Triton's message, and the model that is served.
        which = f" version {version[:80]}" if version else ""
        found = f"{self._model.name!r} is served" + (f", version {served}" if served else "")
        return ModelNotFoundError(f"Request for unknown model: {name[:80]!r}{which} is not found; {found}")


def _failed(response: pb.ModelInferResponse, error: Exception) -> pb.ModelStreamInferResponse:
    """Return the response for an error in a stream that continues.

    `response` has the name, version and id of the request.
    """
    if not isinstance(error, MilongaError):
        log.error("request of a stream", id=response.id[:80], exc_info=error)
    request_id = str(structlog.contextvars.get_contextvars().get("request_id", ""))
    response.parameters[FINAL].bool_param = True
    return pb.ModelStreamInferResponse(
        error_message=status.to_status(error, request_id).message, infer_response=response
    )


def _check_repository(name: str) -> None:
    if name:
        raise UnsupportedError(
            f"'repository_name' is {name[:80]!r}, must be empty: there is only one repository"
        )


def _no_shared_memory() -> UnsupportedError:
    return UnsupportedError("this service does not read or write shared memory; send contents in the message")
