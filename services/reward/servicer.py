"""The rpcs of RewardService: decode, score, encode."""

from collections.abc import Callable, Sequence

from milonga.v1 import reward_pb2 as pb
from milonga.v1 import reward_pb2_grpc as rpc
from services.api.scoring import RankedClip, Reward, rank
from services.audio.clips import check_prompt, read_clips, read_pairs, write_limits
from services.audio.decoding import AudioBounds, ReadClip
from services.errors import FieldViolation, InvalidInputError
from services.reward.model import Pair, RewardScorer
from services.reward.settings import RewardSettings
from services.runtime import tracing
from services.runtime.callers import current_caller
from services.runtime.offloading import OffLoop
from services.wire import write_version

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["RewardService"].full_name

Context = object
"""The rpcs read only their request, so any context will do."""


class RewardServicer(rpc.RewardServiceServicer):
    """Serves one reward model. `CallInterceptor` maps exceptions to statuses."""

    def __init__(self, scorer: RewardScorer, settings: RewardSettings) -> None:
        self.scorer, self.bounds = scorer, AudioBounds(max_batch_size=settings.max_batch_size)
        self._off_loop = OffLoop()
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
        self.scorer.check()
        rewards = await self._reward(lambda: read_pairs(request.pairs, "pairs", self.bounds))
        return pb.BatchComputeRewardsResponse(rewards=map(write_reward, rewards), model=self._version)

    async def RankAudio(self, request: pb.RankAudioRequest, context: Context) -> pb.RankAudioResponse:
        """See reward.proto."""
        self.scorer.check()
        places = rank(await self._reward(lambda: read_candidates(request, self.bounds)))
        return pb.RankAudioResponse(ranking=map(write_place, places), model=self._version)

    async def GetRewardModel(
        self, request: pb.GetRewardModelRequest, context: Context
    ) -> pb.GetRewardModelResponse:
        """See reward.proto."""
        return self._description

    async def _reward(self, read: Callable[[], Sequence[tuple[str, ReadClip]]]) -> list[Reward]:
        """Return the rewards of the pairs that `read` decodes off the event loop, with their warnings."""
        with tracing.span("decode"):
            pairs, warnings = await self._off_loop(lambda: self._prepare(read()))
        with tracing.span("score", clips=len(pairs), model_digest=self.scorer.version.digest):
            return list(map(Reward.of, await self.scorer.score(pairs), warnings))

    def _prepare(self, read: Sequence[tuple[str, ReadClip]]) -> tuple[list[Pair], list[tuple[str, ...]]]:
        seconds = sum(clip.seconds for _, clip in read)
        self.scorer.check(seconds)
        current_caller().charge(seconds)
        of_prompts = self.scorer.prompt_warnings([prompt for prompt, _ in read])
        warnings = [(*clip.warnings, *found) for (_, clip), found in zip(read, of_prompts, strict=True)]
        return [self.scorer.prepare(*pair) for pair in read], warnings


def read_candidates(request: pb.RankAudioRequest, bounds: AudioBounds) -> list[tuple[str, ReadClip]]:
    """Return the decoded clips of a RankAudio request, each with the prompt.

    Raises:
        InvalidInputError: the prompt or a clip is invalid; lists every violation.
    """
    faults: list[FieldViolation] = [*check_prompt(request.prompt, "prompt", bounds)]
    clips: list[ReadClip] = []
    try:
        clips = read_clips(request.clips, "clips", bounds)
    except InvalidInputError as error:
        faults += error.violations
    if faults:
        raise InvalidInputError(*faults)
    return [(request.prompt, clip) for clip in clips]


def write_reward(reward: Reward) -> pb.Reward:
    """Return the wire's message of a reward."""
    return pb.Reward(logit=reward.logit, probability=reward.probability, warnings=reward.warnings)


def write_place(place: RankedClip) -> pb.RankedClip:
    """Return the wire's message of one place of a ranking."""
    return pb.RankedClip(
        clip_index=place.index, reward=write_reward(place.reward), beats_next=place.beats_next
    )
