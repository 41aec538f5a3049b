"""The client and the captioner in this process: one type of answers, one set of refusals."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.api.captioning import Captions, ClipCaptioner
from services.api.scoring import Sound
from services.captioning.model import CaptionModel, scorer_of
from services.captioning.settings import CLAP
from services.client import AsyncAudioClient, AudioClient
from services.errors import InvalidInputError
from services.local_captioner import LocalCaptioner, open_captioner
from services.models.captioner.model import Captioner
from services.models.clap.model import ClapModel
from services.weights.uri import resolve
from tests.services.captioning.serving import CLAP_MODEL, MODEL, Served, write_models
from tests.services.reward.serving import tone, wav
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as serving_scoring

SOUND = (tone(), 16_000)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[AudioClient]:
    with AudioClient(captioning=served.target) as client:
        yield client


@pytest.fixture(scope="module")
def local(captioner: Captioner, clap: ClapModel) -> LocalCaptioner:
    model = CaptionModel(captioner, MODEL, clap=clap, scorer=scorer_of(clap, CLAP_MODEL, CLAP))
    return LocalCaptioner(model)


def same(one: Captions, other: Captions) -> None:
    assert (one.model, one.scorer) == (other.model, other.scorer)
    for left, right in zip(one.captions, other.captions, strict=True):
        assert (left.text, left.warnings) == (right.text, right.warnings)
        for first, second in zip(left.candidates, right.candidates, strict=True):
            assert (first.text, first.beams) == (second.text, second.beams)
            assert first.log_probability == pytest.approx(second.log_probability, abs=1e-3)
            assert first.clap_score == pytest.approx(second.clap_score, abs=1e-4)


def test_captions_here_are_those_of_the_service(
    client: AudioClient, local: LocalCaptioner, tmp_path: Path
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(tone(0.6, hertz=800)).audio)
    sounds: list[Sound] = [SOUND, wav(tone(2.0)).audio, path]
    same(client.caption_audio(sounds), local.caption_audio(sounds))
    plain = {"refine": False, "beams": (1, 2), "max_new_tokens": 3, "max_candidates": 1}
    captioners: tuple[ClipCaptioner, ...] = (client, local)
    ours, theirs = (one.caption_audio(sounds, **plain) for one in captioners)  # type: ignore[arg-type]
    same(ours, theirs)
    assert (len(ours.captions[0].candidates), ours.scorer) == (1, None)


def test_more_clips_than_a_service_takes_are_described_here(local: LocalCaptioner) -> None:
    sounds = [(tone(0.2, hertz=200 + 10 * index), 16_000) for index in range(65)]
    assert len(local.caption_audio(sounds, refine=False, beams=[1], max_new_tokens=2).captions) == 65


def test_the_asynchronous_client_does_the_same(client: AudioClient, served: Served) -> None:
    async def ask() -> tuple[Captions, Any]:
        async with AsyncAudioClient(captioning=served.target) as client:
            return await client.caption_audio([SOUND]), await client.get_captioner()

    captions, description = asyncio.run(ask())
    same(captions, client.caption_audio([SOUND]))
    assert description == client.get_captioner()


SILENCE = (np.zeros(8_000, np.float32), 16_000)
FAULTS: dict[str, tuple[list[Any], dict[str, Any], list[str]]] = {
    "clips": ([SOUND, SILENCE, (tone(0.05), 16_000)], {}, ["clips[1].audio", "clips[2].audio"]),
    "no clips": ([], {}, ["clips"]),
    "no files": ([Path("nowhere.wav"), b""], {}, ["clips[0]", "clips[1]"]),
    "options": ([SOUND], {"beams": [0], "max_new_tokens": 100}, ["beams[0]", "max_new_tokens"]),
    "types": ([SOUND], {"beams": [2.5], "max_candidates": "x"}, ["beams", "max_candidates"]),
    "both": ([SILENCE], {"max_candidates": -1}, ["clips[0].audio", "max_candidates"]),
}


@pytest.mark.parametrize(("sounds", "options", "fields"), FAULTS.values(), ids=FAULTS)
def test_faults_are_the_same_here_and_there(
    client: AudioClient, local: LocalCaptioner, sounds: list[Any], options: Any, fields: list[str]
) -> None:
    calls: list[Callable[..., Captions]] = [client.caption_audio, local.caption_audio]
    found = []
    for call in calls:
        with pytest.raises(InvalidInputError) as caught:
            call(sounds, **options)
        found.append(caught.value.violations)
    assert [fault.field for fault in found[0]] == fields
    assert found[0] == found[1]


def test_an_unknown_option_is_a_mistake_of_the_program(client: AudioClient) -> None:
    with pytest.raises(TypeError, match="num_beams"):
        client.caption_audio([SOUND], num_beams=2)  # type: ignore[call-arg]


def test_models_of_folders_and_a_scoring_service_are_opened_here(tmp_path: Path) -> None:
    captioner, clap = write_models(tmp_path)
    model = resolve(f"file:{captioner}")
    with serving_scoring({"a": f"file:{save_tiny_clap(tmp_path / 'a', 0)}"}) as scoring:
        remote = open_captioner(model, scoring=AudioClient(scoring=scoring.hosted.target))
        near = open_captioner(model, clap=resolve(f"file:{clap}")).caption_audio([SOUND])
        far = remote.caption_audio([SOUND])
        remote.close()
    assert far.captions[0].text == near.captions[0].text
    assert far.scorer is not None
    assert far.scorer.name == "a"
    scores = [[one.clap_score for one in found.captions[0].candidates] for found in (near, far)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert open_captioner(model).caption_audio([SOUND]).scorer is None
