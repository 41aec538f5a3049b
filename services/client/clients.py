"""`AsyncAudioClient`, where every rpc is written once, and `AudioClient`, which is derived from it.

The methods are coroutines over whatever waits (`services.client.transport`). `AudioClient` runs them over the
blocking transport, where none of them ever suspends.
"""

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from milonga.v1 import generation_pb2, operator_pb2, reward_pb2, scoring_pb2
from services.api.best import (
    Best,
    RankBy,
    ScoredClips,
    check_arguments,
    generate_candidates,
    rank,
    run,
)
from services.api.generation import Clip, Generation, GenerationModel, GenerationOptions, Update
from services.api.model import ModelSwitch, ModelVersion
from services.api.scoring import REWARD, Embeddings, Ranking, Rewards, Scores, Sound
from services.client import generation, operator, reward, scoring
from services.client.calls import Calls
from services.client.connection import Connection, ConnectionOptions
from services.client.transport import AsyncioTransport, BlockingTransport, iterate
from services.wire import read_version

P = ParamSpec("P")
T = TypeVar("T")


class _Rpcs:
    """The rpcs of all services, as coroutines."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Make the clips of a prompt, and wait for them."""
        build = partial(generation.build_request, prompt, **options)
        return await self._calls.unary(generation.GENERATE, build, timeout)

    def stream(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        preview_interval_steps: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Update, None]:
        """Make the clips of a prompt, and yield its events. Leaving the loop cancels the rest."""
        inner = generation.build_request(prompt, **options)
        request = generation.stream_request(inner, preview_interval_steps)
        return self._calls.stream(generation.STREAM, request, timeout)

    async def get_model(self, *, timeout: float | None = None) -> GenerationModel:
        """Return which model generates, with its limits and defaults."""
        return await self._calls.unary(generation.GET_MODEL, generation_pb2.GetModelRequest, timeout)

    async def switch_model(self, uri: str, *, token: str, timeout: float | None = None) -> ModelSwitch:
        """Have the generation service load another model beside its own and serve that; for operators.

        Returns when new requests start on it. Requests under way finish on the previous model. Whatever is
        raised, the service goes on serving; past the deadline the switch goes on as well, and `get_model`
        shows its outcome.

        Args:
            uri: model URI as the service resolves it, best with its pin.
            token: the operator's, as the service was started with. Sent over TLS only.
            timeout: in seconds.

        Raises:
            InvalidInputError: not a model URI; or the token would travel in plaintext.
            UnauthenticatedError: the wrong token.
            AlreadyUnderWayError: another switch is under way.
            ModelError: the model was not found, or refused.
        """
        build = partial(operator_pb2.SwitchModelRequest, model_uri=uri)
        return await self._calls.unary(operator.SWITCH_MODEL, build, timeout, token=token)

    async def score_audio(
        self,
        pairs: Sequence[tuple[str, Sound]],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Scores:
        """Return CLAP scores of sounds for their prompts.

        Args:
            pairs: each a prompt and its `Sound`.
            scorers: names of those to use; all by default.
            timeout: in seconds.
        """
        build = partial(scoring.score_request, pairs, scorers)
        return await self._calls.unary(scoring.SCORE_AUDIO, build, timeout)

    async def embed_audio(
        self,
        clips: Sequence[Sound],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Return CLAP embeddings of sounds, by the named scorers, or by all."""
        build = partial(scoring.embed_audio_request, clips, scorers)
        return await self._calls.unary(scoring.EMBED_AUDIO, build, timeout)

    async def embed_text(
        self,
        prompts: Sequence[str],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Return CLAP embeddings of prompts, by the named scorers, or by all."""
        build = partial(scoring.embed_text_request, prompts, scorers)
        return await self._calls.unary(scoring.EMBED_TEXT, build, timeout)

    async def list_scorers(self, *, timeout: float | None = None) -> scoring_pb2.ListScorersResponse:
        """Return which scorers are served, and what a call may hold."""
        return await self._calls.unary(scoring.LIST_SCORERS, scoring_pb2.ListScorersRequest, timeout)

    async def versions(self, *, timeout: float | None = None) -> dict[str, ModelVersion]:
        """Return the weights of the scoring and of the reward service, as far as they have addresses.

        By the scorer's name; the reward model's by `services.api.scoring.REWARD`.
        """
        found: dict[str, ModelVersion] = {}
        if self._calls.has_address(scoring.SERVICE):
            served = (await self.list_scorers(timeout=timeout)).scorers
            found = {scorer.name: read_version(scorer.model) for scorer in served}
        if self._calls.has_address(reward.SERVICE):
            found[REWARD] = read_version((await self.get_reward_model(timeout=timeout)).model)
        return found

    async def compute_rewards(
        self, pairs: Sequence[tuple[str, Sound]], *, timeout: float | None = None
    ) -> Rewards:
        """Return the rewards of sounds for their prompts. `pairs`: each a prompt and its `Sound`."""
        build = partial(reward.rewards_request, pairs)
        return await self._calls.unary(reward.COMPUTE_REWARDS, build, timeout)

    async def rank_audio(
        self, prompt: str, clips: Sequence[Sound], *, timeout: float | None = None
    ) -> Ranking:
        """Put the sounds of one prompt in order, best first, by the reward model."""
        build = partial(reward.rank_request, prompt, clips)
        return await self._calls.unary(reward.RANK_AUDIO, build, timeout)

    async def get_reward_model(self, *, timeout: float | None = None) -> reward_pb2.GetRewardModelResponse:
        """Return which reward model is served, on which CLAP model, and what a call may hold."""
        return await self._calls.unary(reward.GET_REWARD_MODEL, reward_pb2.GetRewardModelRequest, timeout)

    async def generate_best(
        self,
        prompt: str,
        *,
        candidates: int = 4,
        rank_by: RankBy = "reward",
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Best:
        """Make several clips of a prompt and put them in order, best first.

        As many candidates as the service makes in one call (its `max_clip_count`) come from one call, with
        the seed as given, or drawn: they are what `generate` makes with that seed and `clip_count`. More come
        from further calls, whose seeds are hashed from the first one and the number of the call; each clip
        states its own `seed` and `index`. So the same seed gives the same candidates, all different, as long
        as the service's weights and its `max_clip_count` stay the same.

        Args:
            prompt: what the clips should sound like.
            candidates: how many clips to make, in the place of `clip_count`.
            rank_by: ``reward``: by the reward service; a clip's value is its logit. ``clap``: by the scoring
                service; a clip's value is the mean of all scorers' CLAP scores.
            timeout: seconds that all of it may take.
            options: of generation.

        Raises:
            InvalidInputError: also for `clip_count`, and, before anything is generated, for a missing
                address of the scoring or reward service.
            MilongaError: also where a service changed its weights in between.
        """
        check_arguments(candidates, rank_by, options.pop("clip_count", None))
        deadline = self._calls.deadline(timeout)
        # First: a missing service should not be reported after minutes of generation.
        if rank_by == "reward":
            limits = (await self.get_reward_model(timeout=deadline.left)).limits
        else:
            limits = (await self.list_scorers(timeout=deadline.left)).limits
        most = (await self.get_model(timeout=deadline.left)).limits.max_clip_count

        async def make(part: GenerationOptions) -> Generation:
            return await self.generate(prompt, timeout=deadline.left, **part)

        async def score(clips: Sequence[Clip]) -> ScoredClips:
            pairs = [(prompt, clip) for clip in clips]
            if rank_by == "reward":
                return ScoredClips.by_reward(await self.compute_rewards(pairs, timeout=deadline.left))
            return ScoredClips.by_clap(await self.score_audio(pairs, timeout=deadline.left))

        made = await generate_candidates(candidates, most, options, make)
        return await rank(made, rank_by, limits.max_batch_size, score)

    async def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        await self._calls.close()


class AsyncAudioClient(_Rpcs):
    """`AudioClient` for asyncio: the same arguments, answers and errors.

    Belongs to the event loop of its first call.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        scoring: str | None = None,
        reward: str | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        """As `AudioClient`."""
        connection = Connection({"target": target, "scoring": scoring, "reward": reward}, **options)
        super().__init__(Calls(connection, AsyncioTransport(connection)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _blocking(
    method: "Callable[Concatenate[_Rpcs, P], Coroutine[Any, Any, T]]",
) -> "Callable[Concatenate[AudioClient, P], T]":
    """Return `method` of `AudioClient`: the same arguments, and the result instead of a coroutine."""

    @wraps(method)
    def call(self: "AudioClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(method(self._rpcs, *args, **kwargs))

    return call


def _iterating(
    method: "Callable[Concatenate[_Rpcs, P], AsyncGenerator[T, None]]",
) -> "Callable[Concatenate[AudioClient, P], Iterator[T]]":
    """As `_blocking`, of an asynchronous generator."""

    @wraps(method)
    def call(self: "AudioClient", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return iterate(method(self._rpcs, *args, **kwargs))

    return call


class AudioClient:
    """Calls the services. Thread-safe: make one and keep it; close it, or use it as a context.

    Every method raises the tree of `services.errors`: `InvalidInputError` with every violated field,
    `QueueFullError` with `retry_after`, `DeadlineExceededError`, `ServiceUnavailableError`; and plain
    `MilongaError` for a fault of the service. `timeout` is in seconds, everything included: reading files,
    retries, and the waits between them.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        scoring: str | None = None,
        reward: str | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        """Nothing is sent yet: channels are opened at the first call to each address.

        Args:
            target: ``host:port``, or any gRPC name (``dns:///generation:50051``, ``unix:/run/milonga.sock``),
                of the generation service, and of every other one that has no address of its own, as behind
                one gateway. Where a name has several addresses, calls go round.
            scoring: the scoring service's address.
            reward: the reward service's address.
            options: see `ConnectionOptions`.

        Raises:
            InvalidInputError: an empty address, a token without TLS, retries out of range, a TLS file that
                can't be read. A service without any address is reported at the first call to it.
        """
        connection = Connection({"target": target, "scoring": scoring, "reward": reward}, **options)
        self._rpcs = _Rpcs(Calls(connection, BlockingTransport(connection)))

    generate = _blocking(_Rpcs.generate)
    stream = _iterating(_Rpcs.stream)
    get_model = _blocking(_Rpcs.get_model)
    switch_model = _blocking(_Rpcs.switch_model)
    score_audio = _blocking(_Rpcs.score_audio)
    embed_audio = _blocking(_Rpcs.embed_audio)
    embed_text = _blocking(_Rpcs.embed_text)
    list_scorers = _blocking(_Rpcs.list_scorers)
    versions = _blocking(_Rpcs.versions)
    compute_rewards = _blocking(_Rpcs.compute_rewards)
    rank_audio = _blocking(_Rpcs.rank_audio)
    get_reward_model = _blocking(_Rpcs.get_reward_model)
    generate_best = _blocking(_Rpcs.generate_best)
    close = _blocking(_Rpcs.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
