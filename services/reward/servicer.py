"""The rpcs of RewardService: decode, score, encode."""

from collections.abc import Sequence

from milonga.v1 import reward_pb2 as pb
from milonga.v1 import reward_pb2_grpc as rpc
from services.api.scoring import RankedClip, Reward, rank
from services.audio.clips import check_prompt, write_limits
from services.audio.decoding import AudioBounds
from services.reward.model import PreparedClip, RewardScorer
from services.reward.settings import RewardSettings
from services.runtime import tracing
from services.runtime.decoding import ClipDecoder
from services.wire import write_version

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["RewardService"].full_name

Context = object
"""The rpcs read only their request, so any context will do."""


class RewardServicer(rpc.RewardServiceServicer):
    """Serves one reward model. `CallInterceptor` maps exceptions to statuses."""

    def __init__(self, scorer: RewardScorer, settings: RewardSettings) -> None:
        self.scorer, self.bounds = scorer, AudioBounds(max_batch_size=settings.max_batch_size)
        self._decoder = ClipDecoder(self.bounds)
        self._version = write_version(scorer.version)
        self._description = pb.GetRewardModelResponse(
            model=self._version,
            clap=write_version(scorer.clap),
            limits=write_limits(self.bounds, settings.max_request_bytes),
            sample_rate_hertz=scorer.sampling_rate,
        )

    async def BatchComputeRewards(
        self, request: pb.BatchComputeRewardsRequest, context: Context
    ) -> pb.BatchComputeRewardsResponse:
        """See reward.proto."""
        with self.scorer.batcher.expect(len(request.pairs)):
            pairs = await self._decoder.pairs(request.pairs, self.scorer)
            del request  # its clips are no longer needed
            rewards = await self._reward(pairs)
        return pb.BatchComputeRewardsResponse(rewards=map(write_reward, rewards), model=self._version)

    async def RankAudio(self, request: pb.RankAudioRequest, context: Context) -> pb.RankAudioResponse:
        """See reward.proto."""
        prompt, faults = request.prompt, check_prompt(request.prompt, "prompt", self.bounds)
        with self.scorer.batcher.expect(len(request.clips)):
            clips = await self._decoder.clips(request.clips, self.scorer, faults)
            del request
            places = rank(await self._reward([(prompt, clip) for clip in clips]))
        return pb.RankAudioResponse(ranking=map(write_place, places), model=self._version)

    async def GetRewardModel(
        self, request: pb.GetRewardModelRequest, context: Context
    ) -> pb.GetRewardModelResponse:
        """See reward.proto."""
        return self._description

    async def _reward(self, pairs: Sequence[tuple[str, PreparedClip]]) -> list[Reward]:
        """Return the rewards of pairs, with the warnings of their clips and prompts."""
        prompts = [prompt for prompt, _ in pairs]
        of_prompts, readable = await self._decoder.run(
            lambda: (self.scorer.prompt_warnings(prompts), self.scorer.readable(prompts))
        )
        warnings = [(*clip.warnings, *of) for (_, clip), of in zip(pairs, of_prompts, strict=True)]
        with tracing.span("score", clips=len(pairs), model_digest=self.scorer.version.digest):
            logits = await self.scorer.score([(prompt, prepared.clip) for prompt, prepared in pairs])
        return list(map(Reward.of, logits, warnings, readable))


def write_reward(reward: Reward) -> pb.Reward:
    """Return the wire's message of a reward."""
    return pb.Reward(
        logit=reward.logit,
        probability=reward.probability,
        warnings=reward.warnings,
        unread=not reward.readable,
    )


def write_place(place: RankedClip) -> pb.RankedClip:
    """Return the wire's message of one place of a ranking."""
    return pb.RankedClip(
        clip_index=place.index, reward=write_reward(place.reward), beats_next=place.beats_next
    )
