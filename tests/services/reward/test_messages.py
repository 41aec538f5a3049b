from services.api.scoring import Reward, rank
from services.reward.servicer import write_place


def test_one_clip_beats_nobody() -> None:
    (place,) = rank([Reward.of(3.0)])
    message = write_place(place)
    assert not message.HasField("beats_next")
    assert (message.clip_index, message.reward.logit) == (0, 3.0)
