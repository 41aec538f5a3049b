import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from training.soundworld.captions import (
    TEMPLATES,
    VOCABULARY,
    CaptionNoise,
    CaptionTruth,
    caption_parts,
    corrupt,
    drop,
    replace_event,
    swap,
    words,
    write_caption,
)
from training.soundworld.export import INDEX, export_scenes
from training.soundworld.scenes import SceneConfig, make_scene, split_of
from training.soundworld.synthesis import CLASSES, SAMPLING_RATE, synthesise

DOG_THEN_SIREN = CaptionTruth(classes=("dog", "siren"), relation="then")


def test_there_are_at_least_fourteen_classes_and_each_has_words() -> None:
    assert len(CLASSES) >= 14
    assert set(CLASSES) == set(VOCABULARY)
    for nouns, verbs in VOCABULARY.values():
        assert len(nouns) >= 2
        assert len(verbs) >= 2


@pytest.mark.parametrize("event_class", CLASSES)
def test_each_class_is_deterministic_finite_of_unit_level_and_varies(event_class: str) -> None:
    n = SAMPLING_RATE
    first = synthesise(event_class, np.random.default_rng(1), n)
    assert first.shape == (n,)
    assert np.isfinite(first).all()
    assert np.sqrt(np.mean(first**2)) == pytest.approx(1.0)
    assert first[0] == pytest.approx(0.0)
    np.testing.assert_array_equal(first, synthesise(event_class, np.random.default_rng(1), n))
    assert np.abs(first - synthesise(event_class, np.random.default_rng(2), n)).max() > 0.1


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    config = SceneConfig()
    scene, again, other = (make_scene(*key, config) for key in ((3, 5), (3, 5), (4, 5)))
    np.testing.assert_array_equal(scene.waveform, again.waveform)
    assert (scene.caption, scene.events) == (again.caption, again.events)
    assert not np.array_equal(scene.waveform, other.waveform)


@pytest.mark.parametrize("duration", [2.56, 5.12])
def test_truth_lies_inside_the_clip_and_sequences_are_in_order(duration: float) -> None:
    config = SceneConfig(duration=duration, three=0.5 if duration > 5 else 0.0)
    counts = set()
    for scene in (make_scene(0, index, config) for index in range(60)):
        assert scene.waveform.shape == (round(duration * SAMPLING_RATE),)
        assert np.abs(scene.waveform).max() <= 1.0
        assert all(0 <= e.onset < e.offset <= duration for e in scene.events)
        assert tuple(e.event_class for e in scene.events) == scene.truth.classes
        counts.add(len(scene.events))
        if scene.truth.relation == "then":
            ends = [(e.onset, e.offset) for e in scene.events]
            assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert counts == ({1, 2, 3} if duration > 5 else {1, 2})


def test_an_event_is_louder_where_the_truth_says_than_where_it_is_silent() -> None:
    config = SceneConfig(single=1.0, sequence=0.0)
    for scene in (make_scene(1, index, config) for index in range(20)):
        event = scene.events[0]
        start, stop = (round(t * SAMPLING_RATE) for t in (event.onset, event.offset))
        inside = np.sqrt(np.mean(scene.waveform[start:stop] ** 2))
        outside = np.sqrt(np.mean(np.delete(scene.waveform, slice(start, stop)) ** 2))
        assert inside > 10 * outside


def test_every_wording_tells_the_events_in_the_order_of_time() -> None:
    earlier_later = {"after": -1, "then": 1, "followed": 1, "before": 1}
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = caption_parts(DOG_THEN_SIREN, rng)
        told = [event for _, event in parts if event is not None]
        links = " ".join(text for text, event in parts if event is None).replace(",", " ").split()
        direction = next(d for word, d in earlier_later.items() if word in links)
        starts_with_link = parts[0][1] is None
        assert told == ([0, 1] if direction * (-1 if starts_with_link else 1) > 0 else [1, 0])


def test_splits_divide_captions_by_text_alone() -> None:
    assert split_of("A dog barks, then a bell rings") == split_of("a dog barks then a bell rings")
    for split in ("train", "validation", "test"):
        scene = make_scene(0, 0, SceneConfig(split=split))
        assert split_of(scene.caption) == split


def test_mistakes_do_what_they_say() -> None:
    rng = np.random.default_rng(0)
    assert swap(DOG_THEN_SIREN, rng).classes == ("siren", "dog")
    dropped = drop(DOG_THEN_SIREN, rng)
    assert (len(dropped.classes), dropped.relation) == (1, "single")
    replaced = replace_event(DOG_THEN_SIREN, rng).classes
    assert len(set(replaced) & {"dog", "siren"}) == 1
    assert corrupt(DOG_THEN_SIREN, CaptionNoise(), rng) == DOG_THEN_SIREN


def test_mistakes_come_at_the_stated_rates() -> None:
    rng = np.random.default_rng(0)
    told = [
        corrupt(DOG_THEN_SIREN, CaptionNoise(swapped=0.2, missing=0.1, replaced=0.1), rng)
        for _ in range(4000)
    ]
    assert np.mean([t.classes == ("siren", "dog") for t in told]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([len(t.classes) == 1 for t in told]) == pytest.approx(0.1, abs=0.03)
    assert np.mean([t == DOG_THEN_SIREN for t in told]) == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("rates", [{"swapped": -0.1}, {"swapped": 0.6, "missing": 0.5}])
def test_impossible_rates_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rates"):
        CaptionNoise(**rates)


def test_the_vocabulary_covers_every_caption() -> None:
    known = set(words())
    rng = np.random.default_rng(0)
    for relation, count in TEMPLATES:
        for _ in range(50):
            truth = CaptionTruth(classes=tuple(rng.permutation(CLASSES)[:count]), relation=relation)
            assert set(write_caption(truth, rng).lower().replace(",", " , ").split()) <= known


def test_an_export_is_wav_files_and_a_list_that_names_them(tmp_path: Path) -> None:
    captions = list(export_scenes(tmp_path, count=3, seed=7, config=SceneConfig()))
    rows = [json.loads(line) for line in (tmp_path / INDEX).read_text().splitlines()]
    assert [row["captions"] for row in rows] == captions
    for index, row in enumerate(rows):
        samples, rate = soundfile.read(tmp_path / row["location"], dtype="float32")
        assert rate == SAMPLING_RATE
        np.testing.assert_allclose(samples, make_scene(7, index, SceneConfig()).waveform, atol=1 / 32768)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([INDEX, *(r["location"] for r in rows)])


@pytest.mark.parametrize("wrong", [{"duration": 3.0}, {"three": 0.5}, {"single": 0.8, "sequence": 0.5}])
def test_a_wrong_scene_config_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"duration|three|shares"):
        SceneConfig(**wrong)  # type: ignore[arg-type]
