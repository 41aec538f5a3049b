"""The rpcs of GRPCInferenceService: read tensors, let the service do it, write tensors.

Its base and its messages are those that tritonclient brings, so that no proto is copied.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final

import structlog
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from services.errors import MilongaError, ModelNotFoundError, UnsupportedError
from services.inference import describing
from services.inference.model import Context, Leased, Model, Operator, Response
from services.inference.statistics import Statistics
from services.inference.streams import interleave
from services.inference.tensors import Tensors, read_inputs, read_wanted, write_outputs
from services.runtime import status
from services.runtime.offloading import OffLoop
from services.runtime.server import Server

log = structlog.get_logger()

SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

MAX_STREAM_REQUESTS: Final = 64
"""Requests of one stream that are under way at once; the others wait to be read."""

FINAL: Final = "triton_final_response"
"""Parameter of each answer of a stream: whether it is its request's last."""

STATUS_HEADER: Final = "triton_grpc_error"
"""Metadata of a stream, `true`: an error ends it with its status. Otherwise errors are answers."""


def add_inference(server: Server, model: Model, operator: Operator | None = None) -> None:
    """Let `server` answer the protocol for `model`; `operator` may load another, None: nobody may."""
    servicer = InferenceServicer(model, operator, ready=lambda: server.ready)
    server.add(SERVICE_NAME, lambda to: rpc.add_GRPCInferenceServiceServicer_to_server(servicer, to))


class InferenceServicer(rpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # a library without types
    """Serves one model. Exceptions are mapped by the interceptor, to Triton's statuses."""

    def __init__(self, model: Model, operator: Operator | None, *, ready: Callable[[], bool]) -> None:
        self._model, self._operator, self._ready = model, operator, ready
        self._off_loop = OffLoop()
        self._statistics = Statistics()

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Whether the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether it takes requests: not any more while it drains."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether a model of this name and version takes requests; of one that is not served: no."""
        with self._model.lease() as leased:
            served = request.name == self._model.name and request.version in ("", leased.version)
        return pb.ModelReadyResponse(ready=served and self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Which server this is."""
        return describing.server_metadata()

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """The tensors of a model."""
        with self._model.lease() as leased:
            self._check(request.name, request.version, leased)
            return describing.model_metadata(self._model, leased)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """The configuration of a model, in Triton's form."""
        with self._model.lease() as leased:
            self._check(request.name, request.version, leased)
            return describing.model_config(self._model, leased)

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """What requests of this protocol there were; no name: of every model, of which there is one."""
        with self._model.lease() as leased:
            if request.name not in ("", self._model.name):
                raise self._not_found(request.name)
            told = list(self._statistics.messages(self._model.name, leased.version))
        if request.version:
            told = [one for one in told if one.version == request.version]
            if not told:
                raise self._not_found(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=told)

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """Which models there are."""
        _check_repository(request.repository_name)
        with self._model.lease() as leased:
            return describing.repository_index(self._model, leased)

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Serve other weights, as OperatorService.SwitchModel does. Without a model URI: nothing to do."""
        operator = self._authorised(context)
        _check_repository(request.repository_name)
        if request.model_name != self._model.name:
            raise self._not_found(request.model_name)
        uri = describing.read_load(request)
        if uri is not None:
            await operator.load(uri)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Refused: a service without a model would be none."""
        self._authorised(context)
        if request.model_name != self._model.name:
            raise self._not_found(request.model_name)
        raise UnsupportedError(
            f"model {self._model.name!r} is what this service serves, and is never without; load another "
            "version in its place, which unloads this one after its last call, or stop the service"
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """One request, one answer."""
        async with aclosing(self._infer(request, context, stream=False)) as responses:
            (response,) = [response async for _, response in responses]
        return response

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Requests side by side, and for each its answers in order."""
        metadata = dict(context.invocation_metadata() or ())
        strict = str(metadata.get(STATUS_HEADER, "")).lower() == "true"

        def answer(request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
            return self._answer(request, context, strict=strict)

        async with aclosing(interleave(request_iterator, answer, MAX_STREAM_REQUESTS)) as responses:
            async for response in responses:
                yield response

    async def SystemSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise _no_shared_memory()

    async def SystemSharedMemoryRegister(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise _no_shared_memory()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise _no_shared_memory()

    async def CudaSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise _no_shared_memory()

    async def CudaSharedMemoryRegister(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise _no_shared_memory()

    async def CudaSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise _no_shared_memory()

    async def TraceSetting(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise UnsupportedError("this service has no traces to set; its log has a line for each call")

    async def LogSettings(self, request: Any, context: Context) -> Any:
        """Not offered."""
        raise UnsupportedError("the log is set where the service is started: MILONGA_LOG_LEVEL")

    async def _answer(
        self, request: pb.ModelInferRequest, context: Context, *, strict: bool
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """The answers to one request of a stream, an error among them unless `strict`."""
        try:
            async with aclosing(self._infer(request, context, stream=True)) as responses:
                async for final, response in responses:
                    response.parameters[FINAL].bool_param = final
                    yield pb.ModelStreamInferResponse(infer_response=response)
        except Exception as error:
            if strict:
                raise
            yield _failed(request, error)

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context, *, stream: bool
    ) -> AsyncGenerator[tuple[bool, pb.ModelInferResponse], None]:
        """The answers to one request, and whether each is the last."""
        with self._model.lease() as leased:
            self._check(request.model_name, request.model_version, leased)
            with self._statistics.measure(leased.version) as measured:
                wanted = read_wanted(request, self._model.outputs)
                job = await self._off_loop(lambda: leased.read(self._read(request)))
                async with aclosing(leased.run(job, context, stream=stream)) as responses:
                    async for response in responses:
                        measured.add(response)
                        if response.is_sent(wanted):
                            yield response.final, self._write(request, leased, response, wanted)

    def _read(self, request: pb.ModelInferRequest) -> Tensors:
        return read_inputs(request, self._model.inputs, self._model.max_rows)

    def _write(
        self, request: pb.ModelInferRequest, leased: Leased[Any], made: Response, wanted: frozenset[str]
    ) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(
            model_name=self._model.name, model_version=leased.version, id=request.id
        )
        for name, value in {**leased.parameters, **made.parameters}.items():
            match value:
                case bool():
                    response.parameters[name].bool_param = value
                case int():
                    response.parameters[name].int64_param = value
                case float():
                    response.parameters[name].double_param = value
                case str():
                    response.parameters[name].string_param = value
        write_outputs(response, made.outputs, self._model.outputs, wanted)
        return response

    def _authorised(self, context: Context) -> Operator:
        if self._operator is None:
            raise UnsupportedError(
                "loading and unloading models is off: this service has no operator's token, or serves what "
                "is not switched"
            )
        self._operator.authorise(context)
        return self._operator

    def _check(self, name: str, version: str, leased: Leased[Any]) -> None:
        if name != self._model.name:
            raise self._not_found(name)
        if version not in ("", leased.version):
            raise self._not_found(name, version, leased.version)

    def _not_found(self, name: str, version: str = "", served: str = "") -> ModelNotFoundError:
        # Triton's sentence, and what there is instead.
        which = f" version {version[:80]}" if version else ""
        there = f"{self._model.name!r} is served" + (f", version {served}" if served else "")
        return ModelNotFoundError(f"Request for unknown model: {name[:80]!r}{which} is not found; {there}")


def _failed(request: pb.ModelInferRequest, error: Exception) -> pb.ModelStreamInferResponse:
    """The answer to a request that failed, in a stream that goes on."""
    if not isinstance(error, MilongaError):
        log.error("request of a stream", id=request.id[:80], exc_info=error)
    request_id = str(structlog.contextvars.get_contextvars().get("request_id", ""))
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=request.model_version, id=request.id
    )
    response.parameters[FINAL].bool_param = True
    return pb.ModelStreamInferResponse(
        error_message=status.to_status(error, request_id).message, infer_response=response
    )


def _check_repository(name: str) -> None:
    if name:
        raise UnsupportedError(f"'repository_name' is {name[:80]!r}, expected none: there is one repository")


def _no_shared_memory() -> UnsupportedError:
    return UnsupportedError("this service does not read or write shared memory; send contents in the message")
