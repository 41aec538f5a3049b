import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from training.soundworld.captions import (
    HELD_OUT_TEMPLATES,
    TEMPLATES,
    UNREAD_WORDS,
    VOCABULARY,
    CaptionNoise,
    CaptionTruth,
    Relation,
    corrupt,
    cut_caption,
    drop,
    replace_event,
    swap,
    word_classes,
    words,
    write_caption,
)
from training.soundworld.export import INDEX, export_scenes
from training.soundworld.reading import grammar_reader, truth_reading
from training.soundworld.scenes import (
    BACKGROUNDS,
    HEADROOM,
    SceneConfig,
    background,
    make_scene,
    overlap_share,
    split_of,
)
from training.soundworld.synthesis import CLASSES, SAMPLING_RATE, synthesise

DOG_THEN_SIREN = CaptionTruth(classes=("dog", "siren"), relation="then")


def test_there_are_at_least_fourteen_classes_and_each_has_words() -> None:
    assert len(CLASSES) >= 14
    assert set(CLASSES) == set(VOCABULARY)
    for groups in VOCABULARY.values():
        assert len(groups[0].nouns) >= 2
        assert all(len(words.verbs) >= 2 for words in groups)


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


ALL_TEMPLATES = [(kind, held_out) for kind in TEMPLATES for held_out in (False, True)]


def _truths(kind: tuple[Relation, int], count: int, rng: np.random.Generator) -> list[CaptionTruth]:
    relation, events = kind
    return [
        CaptionTruth(classes=tuple(map(str, rng.permutation(CLASSES)[:events])), relation=relation)
        for _ in range(count)
    ]


@pytest.mark.parametrize(("kind", "held_out"), ALL_TEMPLATES)
def test_every_wording_is_read_back_as_what_it_says(kind: tuple[Relation, int], held_out: bool) -> None:
    rng = np.random.default_rng(0)
    for truth in _truths(kind, 150, rng):
        caption = write_caption(truth, rng, held_out=held_out)
        for text in (caption, caption.upper() + "!", caption.replace(",", ";").lower() + "."):
            read, wanted = grammar_reader().read(text), truth_reading(truth)
            assert (set(read.events), read.steps, read.unread) == (set(wanted.events), wanted.steps, ""), text


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("A siren wails, after a dog barks", ("dog", "siren")),
        ("a siren wails after a dog barks.", ("dog", "siren")),
        ("Church bells, then footsteps", ("bell", "footsteps")),
        ("After several dogs bark birds sing", ("dog", "bird")),
        ("First a barking dog, followed by falling rain", ("dog", "rain")),
        ("A taxi honks after glass breaks and before kittens are meowing", ("glass", "horn", "cat")),
    ],
)
def test_sequences_are_read_in_the_order_of_time(text: str, classes: tuple[str, ...]) -> None:
    assert grammar_reader().read(text).steps == tuple(frozenset({name}) for name in classes)


@pytest.mark.parametrize("text", ["", "A toilet flushes", "No dog barks", "A dog barks without rain falling"])
def test_what_is_not_of_the_grammar_is_not_cut(text: str) -> None:
    assert cut_caption(text) is None


def test_a_caption_is_cut_at_its_events() -> None:
    cut = cut_caption("First several dogs are barking, followed by FALLING RAIN.")
    assert cut is not None
    assert (cut.events, cut.classes) == (("several dogs are barking", "falling rain"), ("dog", "rain"))
    assert cut.links == ("First ", ", followed by ", ".")


def test_held_out_templates_are_of_no_training_but_all_their_words_are() -> None:
    for kind in TEMPLATES:
        assert not set(TEMPLATES[kind]) & set(HELD_OUT_TEMPLATES[kind])
    trained = {w for texts in TEMPLATES.values() for text in texts for w in text.replace(",", " ").split()}
    held_out = {
        w for texts in HELD_OUT_TEMPLATES.values() for text in texts for w in text.replace(",", " ").split()
    }
    assert held_out <= trained


def test_a_word_that_is_not_of_the_grammar_is_added_at_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    captions = [write_caption(DOG_THEN_SIREN, rng, unread=0.3) for _ in range(1000)]
    assert not set(UNREAD_WORDS) & set(words())
    strange = [
        bool(set(UNREAD_WORDS) & set(caption.lower().replace(",", "").split())) for caption in captions
    ]
    assert np.mean(strange) == pytest.approx(0.3, abs=0.05)


def test_a_word_of_one_class_is_known_as_that() -> None:
    found = word_classes()
    assert (found["dogs"], found["barking"], found["church"]) == ("dog", "dog", "bell")
    assert "the" not in found


def test_events_at_the_same_time_are() -> None:
    config = SceneConfig(single=0.0, sequence=0.0)
    shares = [overlap_share(make_scene(2, index, config).events) for index in range(60)]
    assert min(shares) > 0.8
    sequences = replace(config, sequence=1.0)
    assert max(overlap_share(make_scene(2, index, sequences).events) for index in range(20)) == 0.0


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("silence", 0.0, 0.0), ("near silence", 1e-6, 2e-3), ("noise", 1e-3, 0.2)]
)
def test_a_background_is_a_clip_of_its_level(kind: str, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    assert kind in BACKGROUNDS
    for _ in range(20):
        clip = background(kind, 2.56, rng)
        assert clip.shape == (40_960,) and clip.dtype == np.float32
        assert low <= float(np.sqrt(np.square(clip, dtype=np.float64).mean())) <= high


def test_scenes_leave_headroom() -> None:
    scenes = [make_scene(5, index, SceneConfig()) for index in range(60)]
    assert max(float(np.abs(scene.waveform).max()) for scene in scenes) <= HEADROOM


def test_splits_divide_captions_by_text_alone() -> None:
    assert split_of("A dog barks, then a bell rings") == split_of("a dog barks then a bell rings")
    assert split_of("A DOG barks; then a bell rings!") == split_of("a dog barks then a bell rings")
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


@pytest.mark.parametrize(("kind", "held_out"), ALL_TEMPLATES)
def test_the_vocabulary_covers_every_caption(kind: tuple[Relation, int], held_out: bool) -> None:
    known = set(words())
    rng = np.random.default_rng(0)
    for truth in _truths(kind, 50, rng):
        caption = write_caption(truth, rng, held_out=held_out)
        assert set(caption.lower().replace(",", " , ").split()) <= known


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
