"""Small services that answer as told: for retries, addresses and messages, where no model is wanted."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from milonga.v1 import (
    audio_pb2,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    reward_pb2,
    reward_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)
from services.client import AsyncAudioClient, AudioClient
from services.runtime import status

FACES = ("blocking", "asyncio")

MODEL = model_pb2.ModelVersion(name="told", version="3", digest="sha256:abc", license="Apache-2.0")
SCORERS = [
    scoring_pb2.Scorer(name=name, model=MODEL, dimension=2, sample_rate_hertz=48_000) for name in ("a", "b")
]
LIMITS = audio_pb2.AudioLimits(max_batch_size=4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A status to answer with."""

    code: grpc.StatusCode
    retry_after: float | None = None
    after: int = 0
    """Events of a stream before it."""
    bare: bool = False
    """Whether it comes without details and words, as from gRPC itself."""


@dataclass(kw_only=True, slots=True)
class Told:
    """What a service is told to do, and what it saw."""

    refusals: list[Refusal] = field(default_factory=list)
    """For the first calls, one each."""
    answering: threading.Event = field(default_factory=threading.Event)
    """Set, unless a test holds the answers back until it sets it."""
    max_clip_count: int = 3
    requests: list[Message] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    """What each call had left to its deadline."""
    metadata: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.answering.set()

    def take(self, request: Message, context: grpc.ServicerContext) -> Refusal | None:
        with self.lock:
            self.requests.append(request)
            self.left.append(context.time_remaining())
            self.metadata.append(dict(context.invocation_metadata()))
            refusal = self.refusals.pop(0) if self.refusals else None
        self.answering.wait(60)
        if refusal is not None and not refusal.after:
            refuse(context, refusal)
        return refusal


def refuse(context: grpc.ServicerContext, refusal: Refusal) -> None:
    if refusal.bare:
        context.abort(refusal.code, refusal.code.name)
    rich = status_pb2.Status(code=refusal.code.value[0], message="told so")
    if refusal.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(refusal.retry_after * 1e9))
        rich.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    context.set_trailing_metadata(((status.DETAILS_KEY, rich.SerializeToString()),))
    context.abort(refusal.code, "told so")


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, told: Told) -> None:
        self._told = told

    def GenerateAudio(self, request: Any, context: Any) -> generation_pb2.GenerateAudioResponse:
        self._told.take(request, context)
        seed = request.seed if request.HasField("seed") else 1234
        response = generation_pb2.GenerateAudioResponse(model=MODEL, warnings=["told"])
        response.timings.total.FromSeconds(2)
        for index in range(request.clip_count):
            # What a clip is worth, to `Reward` and to `Scoring` below: a number that its noise stands for.
            worth = (seed * 7 + index * 3) % 100
            clip = audio_pb2.Clip(
                audio=bytes([worth]), encoding=audio_pb2.AUDIO_ENCODING_WAV, sample_rate_hertz=8000
            )
            response.clips.append(generation_pb2.GeneratedClip(clip=clip, clip_index=index, seed=seed))
        return response

    def StreamGenerateAudio(
        self, request: Any, context: Any
    ) -> Iterator[generation_pb2.StreamGenerateAudioResponse]:
        refusal = self._told.take(request, context)
        for position in range(3):
            if refusal is not None and position == refusal.after:
                refuse(context, refusal)
            yield generation_pb2.StreamGenerateAudioResponse(
                queued=generation_pb2.QueuedEvent(position=position)
            )

    def GetModel(self, request: Any, context: Any) -> generation_pb2.GetModelResponse:
        self._told.take(request, context)
        limits = generation_pb2.GenerationLimits(max_clip_count=self._told.max_clip_count)
        return generation_pb2.GetModelResponse(model=MODEL, limits=limits)


class Scoring(scoring_pb2_grpc.ScoringServiceServicer):
    """Scorer a gives what the first byte says, in hundredths, scorer b the half."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def BatchScoreAudio(self, request: Any, context: Any) -> scoring_pb2.BatchScoreAudioResponse:
        self._told.take(request, context)
        values = [pair.clip.audio[0] / 100 for pair in request.pairs]
        results = [scoring_pb2.AudioScores(scores=[value, value / 2]) for value in values]
        return scoring_pb2.BatchScoreAudioResponse(scorers=SCORERS, results=results)

    def BatchEmbedAudio(self, request: Any, context: Any) -> scoring_pb2.BatchEmbedAudioResponse:
        self._told.take(request, context)
        return scoring_pb2.BatchEmbedAudioResponse(scorers=SCORERS, results=_embeddings(len(request.clips)))

    def BatchEmbedText(self, request: Any, context: Any) -> scoring_pb2.BatchEmbedTextResponse:
        self._told.take(request, context)
        return scoring_pb2.BatchEmbedTextResponse(scorers=SCORERS, results=_embeddings(len(request.prompts)))

    def ListScorers(self, request: Any, context: Any) -> scoring_pb2.ListScorersResponse:
        self._told.take(request, context)
        return scoring_pb2.ListScorersResponse(scorers=SCORERS, limits=LIMITS)


class Reward(reward_pb2_grpc.RewardServiceServicer):
    """The logit is the first byte."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def BatchComputeRewards(self, request: Any, context: Any) -> reward_pb2.BatchComputeRewardsResponse:
        self._told.take(request, context)
        rewards = [reward_pb2.Reward(logit=pair.clip.audio[0], probability=0.5) for pair in request.pairs]
        return reward_pb2.BatchComputeRewardsResponse(rewards=rewards, model=MODEL)

    def RankAudio(self, request: Any, context: Any) -> reward_pb2.RankAudioResponse:
        self._told.take(request, context)
        order = sorted(range(len(request.clips)), key=lambda index: -request.clips[index].audio[0])
        ranking = [
            reward_pb2.RankedClip(
                clip_index=index,
                reward=reward_pb2.Reward(logit=request.clips[index].audio[0], probability=0.5),
                beats_next=0.75 if index != order[-1] else None,
            )
            for index in order
        ]
        return reward_pb2.RankAudioResponse(ranking=ranking, model=MODEL)

    def GetRewardModel(self, request: Any, context: Any) -> reward_pb2.GetRewardModelResponse:
        self._told.take(request, context)
        return reward_pb2.GetRewardModelResponse(model=MODEL, clap=MODEL, limits=LIMITS)


def _embeddings(count: int) -> list[scoring_pb2.Embeddings]:
    return [
        scoring_pb2.Embeddings(
            embeddings=[scoring_pb2.Embedding(values=[index, scorer]) for scorer in range(len(SCORERS))]
        )
        for index in range(count)
    ]


@contextmanager
def serving(
    told: Told,
    *services: str,
    listen: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[str]:
    """Serve all services, or those named, on one free port. Yields the address."""
    add: dict[str, Callable[[grpc.Server], None]] = {
        "generation": lambda server: generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            Generation(told), server
        ),
        "scoring": lambda server: scoring_pb2_grpc.add_ScoringServiceServicer_to_server(
            Scoring(told), server
        ),
        "reward": lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(Reward(told), server),
    }
    options = (("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0))
    server = grpc.server(futures.ThreadPoolExecutor(4), options=options)
    for service in services or add:
        add[service](server)
    if credentials is None:
        port = server.add_insecure_port(listen)
    else:
        port = server.add_secure_port(listen, credentials)
    server.start()
    try:
        yield f"{listen.rpartition(':')[0]}:{port}"
    finally:
        told.answering.set()
        server.stop(0).wait()


def ask(face: str, call: Callable[[Any], Any], target: str | None = None, **options: Any) -> Any:
    """What one call of a fresh client of a face gives."""
    if face == "blocking":
        with AudioClient(target, **options) as client:
            return call(client)

    async def run() -> Any:
        async with AsyncAudioClient(target, **options) as client:
            return await call(client)

    return asyncio.run(run())
