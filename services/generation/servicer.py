"""The rpcs of GenerationService: decode, let the engine generate, encode."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc.aio

from milonga.v1 import generation_pb2 as pb
from milonga.v1 import generation_pb2_grpc as rpc
from milonga.v1 import model_pb2
from services.engine import ClipReady, Finished
from services.generation import convert
from services.generation.running import run
from services.generation.slot import EngineSlot

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(rpc.GenerationServiceServicer):
    """Serves what its slot holds: each call one model. Exceptions are mapped by the interceptor."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot

    async def GenerateAudio(
        self, request: pb.GenerateAudioRequest, context: Context
    ) -> pb.GenerateAudioResponse:
        """See generation.proto."""
        start = time.monotonic()
        clips: list[pb.GeneratedClip] = []
        with self._slot.lease() as served:
            job, output = convert.read_request(request, **served.reading)
            response = pb.GenerateAudioResponse(model=served.version)
            async with aclosing(run(served.engine, [job], context)) as events:
                async for _, event in events:
                    if isinstance(event, ClipReady):
                        clips.append(await _clip(event, output))
                    elif isinstance(event, Finished):
                        response.warnings.extend(event.warnings)
                        total = time.monotonic() - start
                        response.timings.CopyFrom(convert.write_timings(event.timings, total))
        response.clips.extend(sorted(clips, key=lambda clip: clip.clip_index))
        return response

    async def StreamGenerateAudio(
        self, request: pb.StreamGenerateAudioRequest, context: Context
    ) -> AsyncGenerator[pb.StreamGenerateAudioResponse, None]:
        """See generation.proto."""
        start = time.monotonic()
        with self._slot.lease() as served:
            job, output = convert.read_stream_request(request, **served.reading)
            async with aclosing(run(served.engine, [job], context)) as events:
                async for _, event in events:
                    if isinstance(event, ClipReady):
                        yield pb.StreamGenerateAudioResponse(clip=await _clip(event, output))
                    elif isinstance(event, Finished):
                        yield _finished(served.version, event, time.monotonic() - start)
                    else:
                        yield convert.write_event(event)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """See generation.proto."""
        return self._slot.current.description


def _finished(
    version: model_pb2.ModelVersion, event: Finished, total: float
) -> pb.StreamGenerateAudioResponse:
    return pb.StreamGenerateAudioResponse(
        finished=pb.FinishedEvent(
            model=version, warnings=event.warnings, timings=convert.write_timings(event.timings, total)
        )
    )


async def _clip(event: ClipReady, output: convert.OutputFormat) -> pb.GeneratedClip:
    # Off the event loop: encoding ten seconds takes tens of milliseconds.
    return await asyncio.to_thread(convert.write_clip, event, output)
