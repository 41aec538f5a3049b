import math

import numpy as np
import pytest

from milonga.v1 import reward_pb2 as pb
from services.audio.clips import AudioBounds
from services.errors import InvalidInputError
from services.reward.convert import rank, read_candidates, sigmoid, write_place, write_reward
from tests.services.reward.serving import float32, tone


def test_a_ranking_is_best_first_and_equal_rewards_stay_in_order() -> None:
    places = rank([0.5, 2.0, -1.0, 2.0, 0.5])
    assert [place.index for place in places] == [1, 3, 0, 4, 2]
    assert [place.logit for place in places] == [2.0, 2.0, 0.5, 0.5, -1.0]
    beaten = [place.beats_next for place in places]
    assert beaten == [0.5, pytest.approx(sigmoid(1.5)), 0.5, pytest.approx(sigmoid(1.5)), None]


def test_one_clip_beats_nobody() -> None:
    (place,) = rank([3.0])
    message = write_place(place)
    assert not message.HasField("beats_next")
    assert (message.clip_index, message.reward.logit) == (0, 3.0)


def test_sigmoid_holds_at_any_size() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(math.log(3)) == pytest.approx(0.75)
    assert sigmoid(-math.log(3)) == pytest.approx(0.25)
    assert (sigmoid(1e4), sigmoid(-1e4)) == (1.0, 0.0)
    assert sigmoid(-40.0) == pytest.approx(math.exp(-40.0))
    assert write_reward(-math.log(3)).probability == pytest.approx(0.25)


def test_prompt_and_clips_are_refused_together() -> None:
    request = pb.RankAudioRequest(
        prompt=" ", clips=[float32(tone()), float32(np.full(8_000, np.nan, np.float32))]
    )
    with pytest.raises(InvalidInputError) as caught:
        read_candidates(request, AudioBounds())
    assert [fault.field for fault in caught.value.violations][:2] == ["prompt", "clips[1].audio"]


def test_a_prompt_alone_is_refused_with_the_missing_clips() -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_candidates(pb.RankAudioRequest(), AudioBounds())
    assert [fault.field for fault in caught.value.violations] == ["prompt", "clips"]
