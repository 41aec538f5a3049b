"""The rpcs of ExplanationService: decode, explain, encode."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio

from milonga.v1 import explanation_pb2 as pb
from milonga.v1 import explanation_pb2_grpc as rpc
from services.api.explanation import (
    Explanation,
    ExplanationProgress,
    ExplanationRequest,
    ExplanationUpdate,
    as_requested,
    work_of,
)
from services.api.generation import Queued
from services.audio.decoding import MAX_SAMPLING_RATE, AudioBounds, ReadClip
from services.errors import FieldViolation, InvalidInputError
from services.explanation.worker import ExplanationJob, ExplanationWorker
from services.runtime.callers import current_caller
from services.runtime.decoding import ClipDecoder
from services.wire.explanation import (
    read_explanation_request,
    write_explainer,
    write_explanation,
    write_update,
)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["ExplanationService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class ExplanationServicer(rpc.ExplanationServiceServicer):
    """Serves one explainer. `CallInterceptor` maps exceptions to statuses."""

    def __init__(self, worker: ExplanationWorker) -> None:
        self.worker = worker
        self._decoder = ClipDecoder(AudioBounds(max_batch_size=1))

    async def ExplainAudio(
        self, request: pb.ExplainAudioRequest, context: Context
    ) -> AsyncGenerator[pb.ExplainAudioResponse, None]:
        """See explanation.proto."""
        read = await self.read(request)
        async for event in explain(self.worker, read):
            if isinstance(event, Explanation):
                # Encoding ten seconds of sound takes tens of milliseconds: off the event loop.
                yield await asyncio.to_thread(_write_answer, event, read)
            else:
                yield write_update(event)

    async def GetExplainer(
        self, request: pb.GetExplainerRequest, context: Context
    ) -> pb.GetExplainerResponse:
        """See explanation.proto."""
        return write_explainer(self.worker.description)

    async def read(self, message: pb.ExplainAudioRequest) -> ExplanationRequest:
        """Return the request of a message, its clip decoded. Raises `InvalidInputError`."""
        model, given = self.worker.description, None
        if message.HasField("clip"):
            # Without the clip first: its faults and those of the other fields are reported together.
            faults = read_explanation_request(message, model, None)[1]
            relevant = [fault for fault in faults if fault.field not in ("request.duration", "without")]
            preparation = _Preparation(worker=self.worker)
            try:
                (given,) = await self._decoder.clips([message.clip], preparation, relevant)
            except InvalidInputError as error:
                raise _of_one_clip(error) from None
        request, faults = read_explanation_request(message, model, given)
        if faults:
            raise InvalidInputError(*faults)
        return request


def _write_answer(explanation: Explanation, request: ExplanationRequest) -> pb.ExplainAudioResponse:
    return write_explanation(as_requested(explanation, request))


async def explain(
    worker: ExplanationWorker, request: ExplanationRequest
) -> AsyncGenerator[ExplanationUpdate | Explanation, None]:
    """Yield the updates of a request, then its explanation. Leaving the loop ends it within one step."""
    loop = asyncio.get_running_loop()
    updates: asyncio.Queue[ExplanationProgress | None] = asyncio.Queue()  # None: the task has ended

    def report(progress: ExplanationProgress) -> None:
        # Called on the worker's thread, which may outlive the loop of a stopped server.
        if not loop.is_closed():
            loop.call_soon_threadsafe(updates.put_nowait, progress)

    # A queue that is full refuses here, before anything is sent.
    worker.batcher.check(1.0)
    current_caller().charge(work_of(request))
    task = asyncio.create_task(worker.explain(ExplanationJob(request=request, report=report)))
    task.add_done_callback(lambda _: updates.put_nowait(None))
    try:
        await asyncio.sleep(0)  # the task adds the request to the queue
        yield Queued(position=max(0, round(worker.batcher.stats.queue_cost) - 1))
        while (update := await updates.get()) is not None:
            yield update
        yield await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


@dataclass(frozen=True, kw_only=True, slots=True)
class _Preparation:
    """What is kept of the given clip: all of it."""

    worker: ExplanationWorker

    def check(self, seconds: float) -> None:
        """Raise `QueueFullError` if the queue has no room."""
        self.worker.batcher.check(1.0)

    def kept_bytes(self, seconds: float) -> int:
        """Return the size of a mono clip of this length."""
        return math.ceil(4 * seconds * MAX_SAMPLING_RATE)

    def prepare(self, clip: ReadClip) -> ReadClip:
        """Return the clip."""
        return clip


def _of_one_clip(error: InvalidInputError) -> InvalidInputError:
    """Return the error with the field ``clip``, which the decoder has as ``clips[0]``."""
    return InvalidInputError(
        *(
            FieldViolation("clip" + one.field.removeprefix("clips[0]"), one.description)
            if one.field.startswith("clips")
            else one
            for one in error.violations
        )
    )
