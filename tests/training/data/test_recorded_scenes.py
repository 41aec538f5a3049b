"""Scenes of recordings: their events are where the truth says, and their captions say so."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services.errors import InvalidInputError
from training.data.recorded_scenes import (
    RecordedSceneConfig,
    RecordedScenes,
    export_recorded_scenes,
    join_captions,
    sounding_span,
    texts_of,
    write_index,
)
from training.data.recordings import Recording, read_recordings

TONES = {"low_tone": 300, "middle_tone": 1_500, "high_tone": 5_000}
RATE = 16_000


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    """Tones of three classes, one of them in silence, at two rates."""
    folder = tmp_path_factory.mktemp("tones")
    for sound, hertz in TONES.items():
        for number, rate in enumerate((RATE, 44_100)):
            seconds = np.arange(4 * rate) / rate
            waveform = 0.3 * np.sin(2 * np.pi * hertz * seconds)
            if number:
                waveform[: 2 * rate] = 0.0
                waveform[3 * rate :] = 0.0
            (folder / sound).mkdir(exist_ok=True)
            soundfile.write(folder / sound / f"{number}.wav", waveform, rate)
    return read_recordings(folder)


def energy(waveform_N: np.ndarray, hertz: int, onset: float, offset: float) -> float:
    part = waveform_N[round(onset * RATE) : round(offset * RATE)]
    wave = np.exp(-2j * np.pi * hertz * np.arange(len(part)) / RATE)
    return float(abs(wave @ part) / max(1, len(part)))


def test_events_are_where_the_truth_says(tones: list[Recording]) -> None:
    scenes = RecordedScenes(tones, RecordedSceneConfig(sampling_rate=RATE, three=0.5, single=0.1))
    relations = set()
    for index in range(30):
        scene = scenes.scene(index)
        waveform_N, events = scene.clip.render()
        relations.add((scene.truth.relation, len(events)))
        assert len(waveform_N) == round(5.12 * RATE)
        assert 0.01 < np.abs(waveform_N).max() <= 0.9001
        assert tuple(event.event_class for event in events) == scene.truth.classes
        for event in events:
            assert 0 <= event.onset < event.offset <= 5.12
            inside = energy(waveform_N, TONES[event.event_class], event.onset + 0.05, event.offset - 0.05)
            before = energy(waveform_N, TONES[event.event_class], 0, max(0.0, event.onset - 0.02))
            after = energy(waveform_N, TONES[event.event_class], event.offset + 0.02, 5.12)
            assert inside > 20 * max(before, after)
        if scene.truth.relation == "then":
            assert all(one.offset < other.onset for one, other in pairwise(events))
        if scene.truth.relation == "while":
            assert events[0].onset < events[1].offset
            assert events[1].onset < events[0].offset
        named = {f"{sound.replace('_', ' ')}" for sound in scene.truth.classes}
        assert all(name in scene.caption.lower() for name in named)
    assert relations == {("single", 1), ("then", 2), ("then", 3), ("while", 2)}


def test_a_scene_is_a_function_of_its_index(tones: list[Recording]) -> None:
    config = RecordedSceneConfig(sampling_rate=RATE)
    one, same = (RecordedScenes(tones, config).scene(3) for _ in range(2))
    assert one == same
    assert one.clip.digest == same.clip.digest
    assert (one.clip.read()[0] == same.clip.read()[0]).all()
    other = RecordedScenes(tones, RecordedSceneConfig(sampling_rate=RATE, seed=1)).scene(3)
    assert other.clip.digest != one.clip.digest


def test_captions_of_people_are_joined_as_parts_of_a_sentence(tones: list[Recording]) -> None:
    clip = tones[0].clip
    dog = Recording(clip=clip, captions=("A dog barks.", "TV noise!", "I whistle"))
    assert texts_of(dog) == ("a dog barks", "TV noise", "I whistle")
    rng = np.random.default_rng(0)
    captions = {join_captions(("a dog barks", "rain falls"), "then", rng, phrases=False) for _ in range(200)}
    assert "A dog barks then rain falls" in captions
    assert "Rain falls after a dog barks" in captions
    assert "A dog barks followed by rain falls" not in captions
    captions = {join_captions(("a dog bark", "rain"), "while", rng, phrases=True) for _ in range(200)}
    assert "A dog bark with rain in the background" in captions
    assert "A dog bark while rain" not in captions


def test_a_scene_of_two_events_needs_two_classes(tones: list[Recording]) -> None:
    one = [recording for recording in tones if recording.sound == "low_tone"]
    with pytest.raises(InvalidInputError, match=r"has 1 class \(low_tone\), and scenes of 2 events need 2"):
        RecordedScenes(one, RecordedSceneConfig())
    assert (
        RecordedScenes(one, RecordedSceneConfig(single=1.0, sequence=0.0)).scene(0).truth.relation == "single"
    )


def test_exported_scenes_are_a_data_set(tones: list[Recording], tmp_path: Path) -> None:
    scenes = RecordedScenes(tones, RecordedSceneConfig(sampling_rate=RATE, duration=2.56))
    rows = list(export_recorded_scenes(scenes, tmp_path, 4, "train"))
    found = read_recordings(write_index(tmp_path, rows))
    assert [(one.captions, one.fold) for one in found] == [((row["caption"],), "train") for row in rows]
    for index, one in enumerate(found):
        waveform, rate = one.clip.read()
        assert rate == RATE
        assert np.abs(waveform - scenes.scene(index).clip.read()[0]).max() < 1e-4
    assert json.loads((tmp_path / "scenes.jsonl").read_text().splitlines()[0])["events"][0]["onset"] > 0


def test_silence_around_a_sound_is_none_of_it() -> None:
    waveform_N = np.zeros(RATE)
    waveform_N[4_000:8_000] = 0.2
    first, last = sounding_span(waveform_N, RATE)
    assert abs(first - 4_000) <= 320
    assert abs(last - 8_000) <= 320
    assert sounding_span(np.zeros(100), RATE) == (0, 100)
