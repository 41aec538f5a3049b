"""Malformed messages of rpcs that `CallInterceptor` leaves alone: health and probes."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

Context = grpc.aio.ServicerContext[Any, Any]


class ParsingInterceptor(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a single message that can't be parsed.

    Put it first: handlers that read their messages themselves, as those of `CallInterceptor`, are streams.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the wrapped handler of a call. gRPC calls this."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler

        def read(raw: bytes) -> Any:
            try:
                return handler.request_deserializer(raw)
            except DecodeError as error:
                return error

        async def call(request: Any, context: Context) -> Any:
            if isinstance(request, DecodeError):
                text = f"request: can't be parsed as a protobuf message of this rpc: {request}"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
            return await (handler.unary_unary or handler.unary_stream)(request, context)

        wrap: Any = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return wrap(call, read, handler.response_serializer)
