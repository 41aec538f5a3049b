"""Every rpc of every service, written once: coroutines over whatever waits."""

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Unpack

from milonga.v1 import generation_pb2, operator_pb2, reward_pb2, scoring_pb2
from services.client import best, generation, operator, reward, scoring
from services.client.answers import (
    Best,
    Clip,
    Embeddings,
    Generation,
    ModelSwitch,
    ModelVersion,
    RankBy,
    Ranking,
    Rewards,
    Scores,
    Update,
)
from services.client.calls import Calls, Deadline
from services.client.generation import GenerationOptions
from services.client.sounds import Sound


class Rpcs:
    """The methods of `AsyncAudioClient`, which `AudioClient` runs without an event loop."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """As `AudioClient.generate`."""
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
        """As `AudioClient.stream`, for ``async for``."""
        inner = generation.build_request(prompt, **options)
        request = generation.stream_request(inner, preview_interval_steps)
        return self._calls.stream(generation.STREAM, request, timeout)

    async def get_model(self, *, timeout: float | None = None) -> generation_pb2.GetModelResponse:
        """As `AudioClient.get_model`."""
        return await self._calls.unary(generation.GET_MODEL, generation_pb2.GetModelRequest, timeout)

    async def switch_model(self, uri: str, *, token: str, timeout: float | None = None) -> ModelSwitch:
        """As `AudioClient.switch_model`."""
        build = partial(operator_pb2.SwitchModelRequest, model_uri=uri)
        return await self._calls.unary(operator.SWITCH_MODEL, build, timeout, token=token)

    async def score_audio(
        self,
        pairs: Sequence[tuple[str, Sound]],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Scores:
        """As `AudioClient.score_audio`."""
        build = partial(scoring.score_request, pairs, scorers)
        return await self._calls.unary(scoring.SCORE_AUDIO, build, timeout)

    async def embed_audio(
        self,
        clips: Sequence[Sound],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """As `AudioClient.embed_audio`."""
        build = partial(scoring.embed_audio_request, clips, scorers)
        return await self._calls.unary(scoring.EMBED_AUDIO, build, timeout)

    async def embed_text(
        self,
        prompts: Sequence[str],
        *,
        scorers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """As `AudioClient.embed_text`."""
        build = partial(scoring.embed_text_request, prompts, scorers)
        return await self._calls.unary(scoring.EMBED_TEXT, build, timeout)

    async def list_scorers(self, *, timeout: float | None = None) -> scoring_pb2.ListScorersResponse:
        """As `AudioClient.list_scorers`."""
        return await self._calls.unary(scoring.LIST_SCORERS, scoring_pb2.ListScorersRequest, timeout)

    async def compute_rewards(
        self, pairs: Sequence[tuple[str, Sound]], *, timeout: float | None = None
    ) -> Rewards:
        """As `AudioClient.compute_rewards`."""
        return await self._calls.unary(
            reward.COMPUTE_REWARDS, partial(reward.rewards_request, pairs), timeout
        )

    async def rank_audio(
        self, prompt: str, clips: Sequence[Sound], *, timeout: float | None = None
    ) -> Ranking:
        """As `AudioClient.rank_audio`."""
        return await self._calls.unary(
            reward.RANK_AUDIO, partial(reward.rank_request, prompt, clips), timeout
        )

    async def get_reward_model(self, *, timeout: float | None = None) -> reward_pb2.GetRewardModelResponse:
        """As `AudioClient.get_reward_model`."""
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
        """As `AudioClient.generate_best`."""
        best.check_arguments(candidates, rank_by, options.pop("clip_count", None))
        deadline = self._calls.deadline(timeout)
        # The judge is asked first: that it is missing should not be told after minutes of generation.
        if rank_by == "reward":
            judge, limits = self._rewards, (await self.get_reward_model(timeout=deadline.left)).limits
        else:
            judge, limits = self._scores, (await self.list_scorers(timeout=deadline.left)).limits
        made = await self._candidates(prompt, candidates, deadline, options)
        parts = best.batches(made.clips, limits.max_batch_size)
        judged = [await judge(prompt, part, deadline) for part in parts]
        return best.sort(
            made,
            [value for values, _ in judged for value in values],
            rank_by,
            best.same([judges for _, judges in judged]),
        )

    async def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        await self._calls.close()

    async def _candidates(
        self, prompt: str, count: int, deadline: Deadline, options: GenerationOptions
    ) -> Generation:
        """Make candidates by as few calls as the service's limit on clips allows."""
        most = (await self.get_model(timeout=deadline.left)).limits.max_clip_count
        made: list[Generation] = []
        for portion in best.portions(count, most):
            if made:
                options["seed"] = best.next_seed([generation.seed for generation in made])
            options["clip_count"] = portion
            made.append(await self.generate(prompt, timeout=deadline.left, **options))
        return best.merge(made)

    async def _rewards(
        self, prompt: str, clips: Sequence[Clip], deadline: Deadline
    ) -> tuple[list[float], tuple[ModelVersion, ...]]:
        ranking = await self.rank_audio(prompt, clips, timeout=deadline.left)
        places = sorted(ranking.places, key=lambda place: place.index)
        return [place.reward.logit for place in places], (ranking.model,)

    async def _scores(
        self, prompt: str, clips: Sequence[Clip], deadline: Deadline
    ) -> tuple[list[float], tuple[ModelVersion, ...]]:
        scores = await self.score_audio([(prompt, clip) for clip in clips], timeout=deadline.left)
        return scores.values.mean(axis=1).tolist(), tuple(scorer.model for scorer in scores.scorers)
