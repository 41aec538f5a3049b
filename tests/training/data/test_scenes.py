from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from training.data import scenes
from training.data.examples import Examples
from training.data.scenes import (
    GAIN,
    SPLITS,
    EmptyClip,
    GeneratedClip,
    SceneClip,
    SoundworldData,
    contrast,
    paraphrase,
    soundworld_examples,
)
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import Split, split_of

CONFIG = SoundworldData(contrasts=60, held_out=40, rebuilt=0.25, long=0.3)


def _key(truth: CaptionTruth) -> tuple[object, ...]:
    classes = truth.classes if truth.relation == "then" else tuple(sorted(truth.classes))
    return truth.relation, classes


@pytest.mark.parametrize("split", SPLITS)
def test_two_prompts_by_two_clips(split: Split) -> None:
    found = soundworld_examples(CONFIG, split)
    count = CONFIG.contrasts if split == "train" else CONFIG.held_out
    empty = sum(pair.kind == "empty" for pair in found.pairs)
    assert 0 < empty < count / 3
    assert (len(found.labelled), len(found.pairs)) == (4 * count - 2 * empty, 2 * count - empty)
    assert {split_of(example.prompt) for example in found.labelled} == {split}
    assert sum(example.label for example in found.labelled) == 2 * count - empty
    for example in found.labelled:
        assert example.truth is not None
        if isinstance(example.clip, EmptyClip):
            assert not example.label
        else:
            assert isinstance(example.clip, SceneClip)
            assert (_key(example.clip.truth) == _key(example.truth)) == bool(example.label)
    for pair in found.pairs:
        assert isinstance(pair.chosen, SceneClip)
        if pair.kind == "empty":
            assert isinstance(pair.rejected, EmptyClip) and pair.chosen.truth == pair.truth
            continue
        assert isinstance(pair.rejected, SceneClip)
        assert pair.chosen.truth == pair.truth != pair.rejected.truth
        assert pair.chosen.domain == pair.rejected.domain
        shared = set(pair.chosen.truth.classes) & set(pair.rejected.truth.classes)
        assert not shared if pair.kind == "other" else pair.kind == "replaced" or shared
        if pair.kind in ("together", "apart"):
            assert pair.chosen.truth.relation != pair.rejected.truth.relation
            assert shared == set(pair.rejected.truth.classes) or len(pair.rejected.truth.classes) == 3
    kinds = {"swapped", "missing", "added", "replaced", "other", "together", "apart", "empty"}
    assert {pair.kind for pair in found.pairs} == kinds
    # Each clip is chosen once and rejected once.
    crossed = [pair for pair in found.pairs if pair.kind != "empty"]
    assert sorted(p.chosen.name for p in crossed) == sorted(p.rejected.name for p in crossed)


def test_contrasts_depend_on_seed_split_and_index_alone() -> None:
    longer = soundworld_examples(replace(CONFIG, contrasts=80), "train")
    shorter = soundworld_examples(CONFIG, "train").pairs
    assert longer.pairs[: len(shorter)] == shorter
    assert contrast(CONFIG, "train", 3) != contrast(replace(CONFIG, seed=1), "train", 3)
    digests = {clip.digest for split in SPLITS for clip in soundworld_examples(CONFIG, split).clips()}
    assert len(digests) == 2 * (CONFIG.contrasts + 2 * CONFIG.held_out)


def test_shares_of_kinds_and_domains_are_those_of_the_config() -> None:
    pairs = soundworld_examples(replace(CONFIG, contrasts=400), "train").pairs
    assert np.mean([p.chosen.domain == "rebuilt" for p in pairs]) == pytest.approx(0.25, abs=0.06)
    assert np.mean([p.kind in ("together", "apart") for p in pairs]) > 0.1
    durations = [p.chosen.duration for p in pairs if isinstance(p.chosen, SceneClip)]
    assert np.mean([d == 5.12 for d in durations]) == pytest.approx(0.3, abs=0.06)
    assert np.mean([p.kind == "swapped" for p in pairs]) > 0.2


def test_annotators_err_in_the_training_split_and_a_majority_less_often() -> None:
    def errors(examples: Examples, truth: Examples) -> float:
        wrong = [a.label != b.label for a, b in zip(examples.labelled, truth.labelled, strict=True)]
        wrong += [a.chosen != b.chosen for a, b in zip(examples.pairs, truth.pairs, strict=True)]
        return float(np.mean(wrong))

    many = replace(CONFIG, contrasts=400)
    truth = soundworld_examples(many, "train")
    one = soundworld_examples(replace(many, noise=0.2), "train")
    three = soundworld_examples(replace(many, noise=0.2, annotators=3), "train")
    assert errors(one, truth) == pytest.approx(0.2, abs=0.03)
    # Two or three of three: 3 x 0.04 x 0.8 + 0.008
    assert errors(three, truth) == pytest.approx(0.104, abs=0.03)
    held_out = soundworld_examples(replace(CONFIG, noise=0.2), "test")
    assert held_out == soundworld_examples(CONFIG, "test")


def test_a_scene_is_rendered_with_its_gain_and_always_the_same() -> None:
    clips = list(soundworld_examples(CONFIG, "train").clips())
    clip = next(c for c in clips if isinstance(c, SceneClip) and c.model is None)
    waveform, rate = clip.read()
    assert waveform.shape == (round(clip.duration * 16_000),) and rate == 16_000
    assert waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform, clip.read()[0])
    assert GAIN[0] <= clip.gain <= GAIN[1]
    louder, _ = replace(clip, gain=clip.gain + 6).read()
    np.testing.assert_allclose(louder, waveform * 10 ** (6 / 20), rtol=1e-4)


def test_a_rebuilt_scene_differs_but_has_the_same_envelope() -> None:
    clips = soundworld_examples(CONFIG, "train").clips()
    clip = next(c for c in clips if isinstance(c, SceneClip) and c.model and c.duration < 3)
    waveform, rate = clip.read()
    real, _ = replace(clip, model=None).read()
    assert waveform.shape == real.shape and rate == 16_000
    assert not np.allclose(waveform, real, atol=1e-2)
    assert np.isfinite(waveform).all()
    envelopes = [np.abs(w[:40_000]).reshape(-1, 1_000).mean(1) for w in (waveform, real)]
    assert np.corrcoef(*envelopes)[0, 1] > 0.8


def test_rebuilt_scenes_can_be_read_by_several_threads() -> None:
    """Threads that loaded the model at the same time left it without weights."""
    truth = CaptionTruth(classes=("dog",), relation="single")
    clips = [SceneClip(truth=truth, seed=(n,), duration=2.56, gain=0.0, model="mini") for n in range(4)]
    scenes._loaded.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(SceneClip.read, clips))
    for clip, (waveform, _) in zip(clips, together, strict=True):
        np.testing.assert_allclose(waveform, clip.read()[0], atol=1e-4)


def test_generated_clips_are_added_to_the_test_split() -> None:
    config = replace(CONFIG, generated=2)
    assert soundworld_examples(config, "validation") == soundworld_examples(CONFIG, "validation")
    pairs = soundworld_examples(config, "test").pairs[len(soundworld_examples(CONFIG, "test").pairs) :]
    assert 2 <= len(pairs) <= 4
    for pair in pairs:
        assert isinstance(pair.chosen, GeneratedClip)
        assert pair.chosen.prompt == pair.prompt
        assert pair.chosen.domain == "generated"
        if pair.kind == "empty":
            assert isinstance(pair.rejected, EmptyClip)
        else:
            assert isinstance(pair.rejected, GeneratedClip) and pair.rejected.prompt != pair.prompt


def test_without_contrasts_there_are_no_examples() -> None:
    assert soundworld_examples(SoundworldData(contrasts=0), "test") == Examples()


def test_a_paraphrase_belongs_to_its_split() -> None:
    truth = CaptionTruth(classes=("dog", "siren"), relation="then")
    rng = np.random.default_rng(0)
    for split in SPLITS:
        found = [paraphrase(truth, rng, split) for _ in range(5)]
        assert all(caption is None or split_of(caption) == split for caption in found)
        assert any(found)


@pytest.mark.parametrize("wrong", [{"noise": 0.5}, {"annotators": 2}, {"rebuilt": 1.5}])
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]
