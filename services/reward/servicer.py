"""The rpcs of RewardService: decode, let the judge judge, encode."""

from milonga.v1 import reward_pb2 as pb
from milonga.v1 import reward_pb2_grpc as rpc
from services.audio.clips import AudioBounds, read_pairs
from services.reward import convert
from services.reward.judge import Judge, Pair
from services.runtime.offloading import OffLoop
from services.wire import write_version

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["RewardService"].full_name

Context = object
"""Of the call itself nothing is looked at."""


class RewardServicer(rpc.RewardServiceServicer):
    """Serves one reward model. Exceptions are mapped by the interceptor."""

    def __init__(self, judge: Judge, bounds: AudioBounds, *, max_request_bytes: int) -> None:
        self._judge, self._bounds = judge, bounds
        self._off_loop = OffLoop()
        self._version = write_version(judge.version)
        self._description = pb.GetRewardModelResponse(
            model=self._version,
            clap=write_version(judge.clap),
            limits=bounds.message(max_request_bytes),
            sample_rate_hertz=judge.sampling_rate,
        )

    async def BatchComputeRewards(
        self, request: pb.BatchComputeRewardsRequest, context: Context
    ) -> pb.BatchComputeRewardsResponse:
        """See reward.proto."""
        self._judge.check()
        pairs = await self._off_loop(lambda: self._hear_pairs(request))
        logits = await self._judge.judge(pairs)
        return pb.BatchComputeRewardsResponse(rewards=map(convert.write_reward, logits), model=self._version)

    async def RankAudio(self, request: pb.RankAudioRequest, context: Context) -> pb.RankAudioResponse:
        """See reward.proto."""
        self._judge.check()
        pairs = await self._off_loop(lambda: self._hear_candidates(request))
        places = convert.rank(await self._judge.judge(pairs))
        return pb.RankAudioResponse(ranking=map(convert.write_place, places), model=self._version)

    async def GetRewardModel(
        self, request: pb.GetRewardModelRequest, context: Context
    ) -> pb.GetRewardModelResponse:
        """See reward.proto."""
        return self._description

    def _hear_pairs(self, request: pb.BatchComputeRewardsRequest) -> list[Pair]:
        read = read_pairs(request.pairs, "pairs", self._bounds)
        self._judge.check(sum(clip.seconds for _, clip in read))
        return [self._judge.prepare(prompt, clip) for prompt, clip in read]

    def _hear_candidates(self, request: pb.RankAudioRequest) -> list[Pair]:
        prompt, clips = convert.read_candidates(request, self._bounds)
        self._judge.check(sum(clip.seconds for clip in clips))
        return [self._judge.prepare(prompt, clip) for clip in clips]
