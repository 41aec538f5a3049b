import numpy as np
import pytest

from milonga.v1 import reward_pb2 as pb
from services.api.scoring import Reward, rank
from services.audio.decoding import AudioBounds
from services.errors import InvalidInputError
from services.reward.servicer import read_candidates, write_place
from tests.services.reward.serving import float32, tone


def test_one_clip_beats_nobody() -> None:
    (place,) = rank([Reward.of(3.0)])
    message = write_place(place)
    assert not message.HasField("beats_next")
    assert (message.clip_index, message.reward.logit) == (0, 3.0)


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
