"""`AsyncAudioClient`, where every rpc is written once, and `AudioClient`, which is derived from it.

The methods are coroutines over a `services.client.transport.Transport`. `AudioClient` runs them over the
blocking transport, where they never suspend.
"""

import copy
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from milonga.v1 import (
    captioning_pb2,
    explanation_pb2,
    generation_pb2,
    operator_pb2,
    reward_pb2,
    scoring_pb2,
)
from services.api.best import (
    Best,
    RankBy,
    ScoredClips,
    check_arguments,
    generate_candidates,
    rank,
    run,
)
from services.api.captioning import CaptionOptions, Captions
from services.api.explanation import ExplainerModel, Explanation, ExplanationOptions, ExplanationUpdate
from services.api.generation import Clip, Generation, GenerationModel, GenerationOptions, Update
from services.api.model import ModelSwitch, ModelVersion
from services.api.scoring import REWARD, Embeddings, Ranking, Rewards, Scores, Sound
from services.client import captioning, explanation, generation, operator, reward, scoring
from services.client.calls import Calls
from services.client.connection import Connection, ConnectionOptions
from services.client.transport import AsyncioTransport, BlockingTransport, iterate
from services.errors import MilongaError
from services.runtime import tracing
from services.runtime.callers import Priority
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
        """Generate the clips of a prompt; return when they are done."""
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
        """Generate the clips of a prompt; yield its events. Leaving the loop cancels the request."""
        inner = generation.build_request(prompt, **options)
        request = generation.stream_request(inner, preview_interval_steps)
        return self._calls.stream(generation.STREAM, request, timeout)

    async def get_model(self, *, timeout: float | None = None) -> GenerationModel:
        """Return the served generator, with its limits and defaults."""
        return await self._calls.unary(generation.GET_MODEL, generation_pb2.GetModelRequest, timeout)

    async def switch_model(self, uri: str, *, token: str, timeout: float | None = None) -> ModelSwitch:
        """Let the generation service load another model and serve it instead of its own; for operators.

        Returns when new requests use the new model. Running requests finish with the previous one. If the
        call fails, the service keeps serving. After the deadline, or when this call is cancelled, the
        switch is abandoned; `get_model` shows what is served.

        Args:
            uri: model URI, resolved by the service; preferably pinned to a digest.
            token: the operator's token that the service was started with. Sent only over TLS.
            timeout: seconds that the call may take.

        Raises:
            InvalidInputError: `uri` is not a model URI, or the token would be sent in plaintext.
            UnauthenticatedError: the token is wrong.
            AlreadyUnderWayError: another switch is running.
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
        """Return CLAP scores of prompts and sounds.

        Args:
            pairs: prompts, each with a `Sound`.
            scorers: names of the scorers to use; None: all.
            timeout: seconds that the call may take.
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
        """Return CLAP embeddings of sounds by the named scorers, or by all."""
        build = partial(scoring.embed_audio_request, clips, scorers)
        return await self._calls.unary(scoring.EMBED_AUDIO, build, timeout)

    async def embed_text(
        self,
        prompts: Sequence[str],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Return CLAP embeddings of prompts by the named scorers, or by all."""
        build = partial(scoring.embed_text_request, prompts, scorers)
        return await self._calls.unary(scoring.EMBED_TEXT, build, timeout)

    async def list_scorers(self, *, timeout: float | None = None) -> scoring_pb2.ListScorersResponse:
        """Return the served scorers, and the limits of a call."""
        return await self._calls.unary(scoring.LIST_SCORERS, scoring_pb2.ListScorersRequest, timeout)

    async def versions(self, *, timeout: float | None = None) -> dict[str, ModelVersion]:
        """Return the weights of the scoring and reward services that have addresses.

        Keys are the scorers' names, and `services.api.scoring.REWARD` for the reward model.
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
        """Return the rewards of prompts and sounds. `pairs` are prompts, each with a `Sound`."""
        build = partial(reward.rewards_request, pairs)
        return await self._calls.unary(reward.COMPUTE_REWARDS, build, timeout)

    async def rank_audio(
        self, prompt: str, clips: Sequence[Sound], *, timeout: float | None = None
    ) -> Ranking:
        """Rank the sounds of one prompt by the reward model, best first."""
        build = partial(reward.rank_request, prompt, clips)
        return await self._calls.unary(reward.RANK_AUDIO, build, timeout)

    async def get_reward_model(self, *, timeout: float | None = None) -> reward_pb2.GetRewardModelResponse:
        """Return the served reward model, its CLAP model, and the limits of a call."""
        return await self._calls.unary(reward.GET_REWARD_MODEL, reward_pb2.GetRewardModelRequest, timeout)

    async def caption_audio(
        self, clips: Sequence[Sound], *, timeout: float | None = None, **options: Unpack[CaptionOptions]
    ) -> Captions:
        """Return a caption of each sound, with the candidates that it was chosen from."""
        build = partial(captioning.caption_request, clips, **options)
        return await self._calls.unary(captioning.CAPTION_AUDIO, build, timeout)

    async def get_captioner(self, *, timeout: float | None = None) -> captioning_pb2.GetCaptionerResponse:
        """Return the served captioner, its defaults, and the limits of a call."""
        return await self._calls.unary(captioning.GET_CAPTIONER, captioning_pb2.GetCaptionerRequest, timeout)

    async def explain_audio(
        self,
        prompt: str,
        *,
        on_update: Callable[[ExplanationUpdate], None] | None = None,
        timeout: float | None = None,
        **options: Unpack[ExplanationOptions],
    ) -> Explanation:
        """Return how much each frame of a clip owes to each word of its prompt.

        Args:
            prompt: the prompt of the clip.
            on_update: called with each update before the answer: place in the queue, and progress.
            timeout: seconds that the call may take.
            options: the method, and options of the generation; `clip` for one that was made elsewhere.
        """
        request = explanation.explanation_request(prompt, **options)
        found: Explanation | None = None
        async with aclosing(self._calls.stream(explanation.EXPLAIN_AUDIO, request, timeout)) as events:
            async for event in events:
                if isinstance(event, Explanation):
                    found = replace(event, prompt=prompt)
                elif on_update is not None:
                    on_update(event)
        if found is None:
            raise MilongaError("the stream ended without an explanation; try again")
        return found

    async def get_explainer(self, *, timeout: float | None = None) -> ExplainerModel:
        """Return the served explainer, with its methods, limits and defaults."""
        return await self._calls.unary(
            explanation.GET_EXPLAINER, explanation_pb2.GetExplainerRequest, timeout
        )

    async def generate_best(
        self,
        prompt: str,
        *,
        candidates: int = 4,
        rank_by: RankBy = "reward",
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Best:
        """Generate several clips of a prompt, and rank them, best first.

        As many candidates as the service makes in one call (its `max_clip_count`) come from one call, with
        the seed as given, or drawn: they are what `generate` makes with that seed and `clip_count`. More come
        from further calls, whose seeds are hashed from the first one and the number of the call; each clip
        states its own `seed` and `index`. So the same seed gives the same candidates, all different, as long
        as the service's weights and its `max_clip_count` stay the same.

        Args:
            prompt: the prompt of the clips.
            candidates: number of clips; replaces `clip_count`.
            rank_by: ``reward``: by the reward service; a clip's value is its logit. ``clap``: by the scoring
                service; a clip's value is the mean of all scorers' CLAP scores.
            timeout: seconds that all calls together may take.
            options: options of the generation.

        Raises:
            InvalidInputError: also for `clip_count`, and, before anything is generated, for a missing
                address of the scoring or reward service.
            MilongaError: also if a service changed its weights between two calls.
        """
        check_arguments(candidates, rank_by, options.pop("clip_count", None))
        with tracing.span("generate_best", clips=candidates):
            deadline = self._calls.deadline(timeout)
            # First, so that a missing service is not reported only after minutes of generation.
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

    def acting_for(self, token: str | None, priority: Priority = "interactive") -> Self:
        """Return a client that calls over the same channels for another caller. Closing it closes both.

        Args:
            token: the other caller's token; None: it is anonymous.
            priority: its priority class.

        Raises:
            InvalidInputError: the token would leave this machine in plaintext, or is no token.
        """
        other = copy.copy(self)
        other._calls = self._calls.acting_for(token, priority)
        return other

    async def close(self) -> None:
        """Close the channels; running calls are cancelled."""
        await self._calls.close()


class AsyncAudioClient(_Rpcs):
    """`AudioClient` for asyncio: the same arguments, results and errors.

    Belongs to the event loop of its first call.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        scoring: str | None = None,
        reward: str | None = None,
        captioning: str | None = None,
        explanation: str | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        """Check the arguments; they are those of `AudioClient`."""
        addresses = {
            "target": target, "scoring": scoring, "reward": reward, "captioning": captioning,
            "explanation": explanation,
        }  # fmt: skip
        connection = Connection(addresses, **options)
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
    """Return `method` of `AudioClient`: an iterator instead of an asynchronous generator."""

    @wraps(method)
    def call(self: "AudioClient", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return iterate(method(self._rpcs, *args, **kwargs))

    return call


class AudioClient:
    """A client of the services. Thread-safe: reuse one client, and close it or use it as a context manager.

    Methods raise the exceptions of `services.errors`: `InvalidInputError` with every invalid field,
    `QueueFullError` with `retry_after`, `DeadlineExceededError`, `ServiceUnavailableError`, and plain
    `MilongaError` for an internal error of the service. `timeout` is in seconds, and includes reading files,
    retries, and the waits between them.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        scoring: str | None = None,
        reward: str | None = None,
        captioning: str | None = None,
        explanation: str | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        """Check the arguments. Channels open at the first call to each address.

        Args:
            target: ``host:port``, or any gRPC name (``dns:///generation:50051``, ``unix:/run/milonga.sock``),
                of the generation service, and of every other service without its own address, as behind a
                gateway. Calls are balanced round robin over a name's addresses.
            scoring: address of the scoring service.
            reward: address of the reward service.
            captioning: address of the captioning service.
            explanation: address of the explanation service.
            options: see `ConnectionOptions`.

        Raises:
            InvalidInputError: an address is a URL or has no port, a token is given without TLS, `retries` is
                out of range, or a TLS file can't be read. A missing address is reported at the first call to
                its service, as is TLS on one side only.
        """
        addresses = {
            "target": target, "scoring": scoring, "reward": reward, "captioning": captioning,
            "explanation": explanation,
        }  # fmt: skip
        connection = Connection(addresses, **options)
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
    caption_audio = _blocking(_Rpcs.caption_audio)
    get_captioner = _blocking(_Rpcs.get_captioner)
    explain_audio = _blocking(_Rpcs.explain_audio)
    get_explainer = _blocking(_Rpcs.get_explainer)
    generate_best = _blocking(_Rpcs.generate_best)
    close = _blocking(_Rpcs.close)

    def acting_for(self, token: str | None, priority: Priority = "interactive") -> Self:
        """Return a client that calls over the same channels for another caller; see `AsyncAudioClient`."""
        other = copy.copy(self)
        other._rpcs = self._rpcs.acting_for(token, priority)
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
