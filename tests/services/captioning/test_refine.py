"""CLAP-Refine by a scoring service."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from milonga.v1 import captioning_pb2 as pb
from services.captioning.settings import CaptioningSettings
from services.client import AudioClient
from services.errors import InvalidInputError, ServiceUnavailableError
from services.models.captioner.model import Captioner
from services.processes import free_port
from services.runtime.settings import load_settings
from tests.services.captioning.serving import Served, serving
from tests.services.reward.serving import float32, tone
from tests.services.scoring.serving import Served as Scoring
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as serving_scoring


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scoring]:
    """Two scorers, of which the first equals the fixture `clap`; four elements in a call."""
    folder = tmp_path_factory.mktemp("scorers")
    uris = {
        name: f"file:{save_tiny_clap(folder / name, seed)}" for name, seed in (("first", 0), ("second", 1))
    }
    with serving_scoring(uris, max_batch_size=4) as served:
        yield served


@pytest.fixture(scope="module")
def refined(captioner: Captioner, scoring: Scoring) -> Iterator[Served]:
    with serving(captioner, scoring=scoring.hosted.target) as served:
        yield served


def test_a_scoring_service_chooses_as_the_model_in_the_process_does(refined: Served, served: Served) -> None:
    clips = [float32(tone(0.4 + 0.1 * index, hertz=300 * (index + 1))) for index in range(6)]
    request = pb.CaptionAudioRequest(clips=clips, beams=[1, 2, 3])
    far, near = refined.stub.CaptionAudio(request), served.stub.CaptionAudio(request)
    for one, other in zip(far.captions, near.captions, strict=True):
        assert one.text == other.text
        scores = [[c.clap_score for c in caption.candidates] for caption in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert (far.scorer.name, far.scorer.model.name) == ("first", "first")
    assert far.timings.refine.ToNanoseconds() > 0


def test_the_scorer_can_be_chosen(captioner: Captioner, scoring: Scoring) -> None:
    address = scoring.hosted.target
    with serving(captioner, scoring=address, scoring_scorer="second") as served:
        answer = served.stub.CaptionAudio(pb.CaptionAudioRequest(clips=[float32(tone())]))
    assert answer.scorer.name == "second"
    with serving(captioner, scoring=address, scoring_scorer="third") as served:
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.CaptionAudio(pb.CaptionAudioRequest(clips=[float32(tone())]))
        assert isinstance(caught.value, grpc.Call)
        # The caller has chosen nothing.
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "third" in (caught.value.details() or "")


def test_the_service_describes_itself_without_the_other(refined: Served) -> None:
    answer = refined.stub.GetCaptioner(pb.GetCaptionerRequest())
    assert (answer.refines, answer.HasField("scorer")) == (True, False)


def test_an_absent_scoring_service_is_no_fault_of_the_caller(captioner: Captioner) -> None:
    with (
        serving(captioner, scoring=f"127.0.0.1:{free_port()}") as served,
        AudioClient(captioning=served.target, retries=0) as client,
    ):
        sound = (tone(), 16_000)
        with pytest.raises(ServiceUnavailableError, match="scoring service that chooses"):
            client.caption_audio([sound], timeout=20)
        assert client.caption_audio([sound], refine=False).captions[0].candidates


def test_sound_above_48_khz_is_sent_at_48(refined: Served) -> None:
    high = tone(0.3, rate=96_000)
    answer = refined.stub.CaptionAudio(pb.CaptionAudioRequest(clips=[float32(high, 96_000)]))
    scores = [one.clap_score for one in answer.captions[0].candidates]
    assert np.isfinite(scores).all()


def test_settings_of_the_scoring_service_are_checked(captioner: Captioner, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="both given"):
        load_settings(CaptioningSettings, model="x", clap="x", scoring="y:1")
    with pytest.raises(InvalidInputError, match=r"scoring: .*has no port"), serving(captioner, scoring="y"):
        pass
    with (
        pytest.raises(InvalidInputError, match="scoring_ca_file: "),
        serving(captioner, scoring="y:1", scoring_ca_file=tmp_path / "none.pem"),
    ):
        pass
