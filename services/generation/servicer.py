"""The rpcs of GenerationService: decode, let the engine generate, encode."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc.aio

from milonga.v1 import generation_pb2 as pb
from milonga.v1 import generation_pb2_grpc as rpc
from services.api.generation import Clip, Event, Failed, Finished, GenerationRequest, Update
from services.fairness import Account
from services.generation import convert
from services.runtime import tracing
from services.runtime.callers import current_caller
from services.wire import write_version
from services.wire.generation import write_model

if TYPE_CHECKING:
    from opentelemetry.context import Context as TraceContext

    from services.engine import Engine, Handle
    from services.generation.slot import EngineSlot

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(rpc.GenerationServiceServicer):
    """Serves the model of a slot; each call uses one model. Exceptions are mapped by the interceptor."""

    def __init__(self, slot: "EngineSlot") -> None:
        self._slot = slot

    async def GenerateAudio(
        self, message: pb.GenerateAudioRequest, context: Context
    ) -> pb.GenerateAudioResponse:
        """See generation.proto."""
        start = time.monotonic()
        clips: list[pb.GeneratedClip] = []
        with self._slot.lease() as served:
            request = convert.read_request(message, served.engine.description)
            response = pb.GenerateAudioResponse()
            async with aclosing(run(served.engine, [request], context.time_remaining())) as events:
                async for _, event in events:
                    if isinstance(event, Clip):
                        with tracing.span("encode_audio"):
                            clips.append(await asyncio.to_thread(convert.write_clip, event, request))
                    elif isinstance(event, Finished):
                        total = time.monotonic() - start
                        response.model.CopyFrom(write_version(event.model))
                        response.warnings.extend(event.warnings)
                        response.timings.CopyFrom(convert.write_timings(event.timings, total))
                        if event.adapter is not None:
                            response.adapter.CopyFrom(write_version(event.adapter))
        response.clips.extend(sorted(clips, key=lambda clip: clip.clip_index))
        return response

    async def StreamGenerateAudio(
        self, message: pb.StreamGenerateAudioRequest, context: Context
    ) -> AsyncGenerator[pb.StreamGenerateAudioResponse, None]:
        """See generation.proto."""
        start = time.monotonic()
        with self._slot.lease() as served:
            request = convert.read_stream_request(message, served.engine.description)
            async with aclosing(run(served.engine, [request], context.time_remaining())) as events:
                async for _, event in events:
                    write = partial(convert.write_event, event, request, time.monotonic() - start)
                    if not isinstance(event, Clip):
                        yield write()
                        continue
                    # Encoding ten seconds of sound takes tens of milliseconds: off the event loop.
                    with tracing.span("encode_audio"):
                        response = await asyncio.to_thread(write)
                    yield response

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """See generation.proto."""
        return write_model(self._slot.current.engine.description)


async def run(
    engine: "Engine", requests: Sequence[GenerationRequest], seconds_left: float | None
) -> AsyncGenerator[tuple[int, Update], None]:
    """Yield the index of a request and its next event, until each of `requests` is `Finished`.

    `seconds_left` is the time to the caller's deadline; None if there is none.
    Raises the error of the first request that fails or is refused. All others are then cancelled, as they are
    if the caller stops early.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    deadline = None if seconds_left is None else time.monotonic() + seconds_left
    caller = current_caller()
    account = Account(caller.key, caller.priority)
    trace = tracing.current()
    handles: list[Handle] = []

    def submit(index: int, request: GenerationRequest) -> "Handle":
        def on_event(event: Event) -> None:
            # Called on the engine's thread, which may outlive the loop of a stopped server.
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return engine.submit(request, on_event, deadline=deadline, account=account)

    for adapter in {request.adapter for request in requests} - {""}:
        await asyncio.to_thread(engine.load_adapter, adapter)
    try:
        for index, request in enumerate(requests):
            handles.append(submit(index, request))
        # Only what the engine accepted. A caller without quota has its requests cancelled below.
        units = (one.clip_count * one.num_inference_steps * one.duration for one in requests)
        current_caller().charge(sum(units))
        left = len(requests)
        while left:
            index, event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            yield index, event
            left -= isinstance(event, Finished)
    finally:
        for handle in handles:
            handle.cancel()
        if trace is not None:
            digest = engine.description.model.digest
            for handle, request in zip(handles, requests, strict=False):
                _record(handle, request, digest, trace)


def _record(handle: "Handle", request: GenerationRequest, digest: str, trace: "TraceContext") -> None:
    """Record the stages of a request as children of `trace`."""
    for stage in handle.stages():
        tracing.record(
            *stage,
            trace,
            steps=request.num_inference_steps,
            clips=request.clip_count,
            batch=handle.batch,
            model_digest=digest,
        )
