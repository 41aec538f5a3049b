"""Malformed messages of rpcs that `CallInterceptor` leaves alone: health, probes and reflection."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

Context = grpc.aio.ServicerContext[Any, Any]


class ParsingInterceptor(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a message that can't be parsed.

    Put it first: the handlers of `CallInterceptor` read their messages themselves, and have no parser.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the wrapped handler of a call. gRPC calls this."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        write = handler.response_serializer

        def read(raw: bytes) -> Any:
            try:
                return handler.request_deserializer(raw)
            except DecodeError as error:
                return error

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_stream(handler.stream_stream), read, write)

        async def call(request: Any, context: Context) -> Any:
            await _check(request, context)
            return await (handler.unary_unary or handler.unary_stream)(request, context)

        wrap: Any = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return wrap(call, read, write)


def _stream(behaviour: Any) -> Any:
    """Return the behaviour of a stream with checked messages. Only reflection has such a stream."""

    async def checked(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            await _check(request, context)
            yield request

    async def call(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for response in behaviour(checked(requests, context), context):
            yield response

    return call


async def _check(request: Any, context: Context) -> None:
    if isinstance(request, DecodeError):
        text = f"request: can't be parsed as a protobuf message of this rpc: {request}"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
