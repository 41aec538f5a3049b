"""The rpcs of reward.proto: requests from arguments, values from messages."""

from collections.abc import Sequence

from milonga.v1 import reward_pb2 as pb
from milonga.v1 import reward_pb2_grpc as rpc
from services.api.scoring import RankedClip, Ranking, Reward, Rewards, Sound
from services.client.sounds import RequestWriter
from services.client.transport import Service, Unary, whole
from services.wire import read_version


def rewards_request(pairs: Sequence[tuple[str, Sound]]) -> pb.BatchComputeRewardsRequest:
    """Return the message of BatchComputeRewards.

    Raises:
        InvalidInputError: what the wire can't carry, all at once; so does `rank_request`.
    """
    write = RequestWriter()
    return write.checked(pb.BatchComputeRewardsRequest(pairs=write.pairs(pairs, "pairs")))


def rank_request(prompt: str, clips: Sequence[Sound]) -> pb.RankAudioRequest:
    """Return the message of RankAudio."""
    write = RequestWriter()
    return write.checked(
        pb.RankAudioRequest(prompt=write.text(prompt, "prompt"), clips=write.sounds(clips, "clips"))
    )


def read_rewards(response: pb.BatchComputeRewardsResponse) -> Rewards:
    """Read the answer of BatchComputeRewards."""
    return Rewards(
        rewards=tuple(_read_reward(reward) for reward in response.rewards), model=read_version(response.model)
    )


def read_ranking(response: pb.RankAudioResponse) -> Ranking:
    """Read the answer of RankAudio."""
    return Ranking(
        places=tuple(
            RankedClip(
                index=place.clip_index,
                reward=_read_reward(place.reward),
                beats_next=place.beats_next if place.HasField("beats_next") else None,
            )
            for place in response.ranking
        ),
        model=read_version(response.model),
    )


def _read_reward(reward: pb.Reward) -> Reward:
    return Reward(
        logit=reward.logit,
        probability=reward.probability,
        warnings=tuple(reward.warnings),
        readable=not reward.unread,
    )


SERVICE = Service(
    name="reward",
    argument="reward",
    stub=rpc.RewardServiceStub,
    remedy="send less sound at once",
)
COMPUTE_REWARDS = Unary(
    service=SERVICE, method=lambda stub: stub.BatchComputeRewards, read=read_rewards, heavy=True
)
RANK_AUDIO = Unary(service=SERVICE, method=lambda stub: stub.RankAudio, read=read_ranking, heavy=True)
GET_REWARD_MODEL = Unary(service=SERVICE, method=lambda stub: stub.GetRewardModel, read=whole)
