"""The mini CLAP models: their loss against its closed form, their captions, their figures."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from services.models.clap.loading import load_clap
from services.models.manifest import verify_manifest
from services.models.mini import mini_folder
from services.models.reward.model import load_reward
from training.mini import clap, evaluate_clap, parsing
from training.mini.clap import TEXT_LENGTH, build_tokenizer
from training.mini.evaluate_reward import pair_accuracy, real_pairs, reward_score
from training.soundworld.captions import CaptionTruth, word_classes, words
from training.soundworld.scenes import BACKGROUNDS, SceneConfig, make_scene, split_of

THEN = CaptionTruth(classes=("dog", "siren"), relation="then")
WHILE = CaptionTruth(classes=("dog", "siren"), relation="while")
SINGLE = CaptionTruth(classes=("rain",), relation="single")


NO_CLIPS = torch.zeros(0, 2)


def unit(*rows: tuple[float, float]) -> torch.Tensor:
    return nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_the_loss_of_two_clips_without_negatives_is_the_cross_entropy_worked_by_hand() -> None:
    same = unit((1.0, 0.0), (0.0, 1.0))
    none = torch.zeros(2, 0, dtype=torch.bool)
    alike = torch.zeros(2, 2, dtype=torch.bool)
    loss = clap.contrastive_loss(same, same, torch.zeros(2, 0, 2), none, alike, torch.tensor(3.0), NO_CLIPS)
    # Each row: own 3, other 0.
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-3.0)), rel=1e-6)


def test_hard_negatives_join_the_clips_row_alone_and_only_where_they_are_known() -> None:
    same = unit((1.0, 0.0), (0.0, 1.0))
    negatives = torch.stack([same, same])  # [B, K, D]: one equal to the true caption, one unlike it
    alike = torch.zeros(2, 2, dtype=torch.bool)
    known = torch.tensor([[True, False], [False, False]])
    loss = clap.contrastive_loss(same, same, negatives, known, alike, torch.tensor(3.0), NO_CLIPS)
    plain = math.log(1 + math.exp(-3.0))
    with_twin = math.log(2 + math.exp(-3.0))  # own 3, its twin 3, the other clip's 0
    assert float(loss) == pytest.approx(0.5 * ((with_twin + plain) / 2 + plain), rel=1e-6)


def test_clips_without_events_join_each_captions_row_of_clips() -> None:
    same = unit((1.0, 0.0), (0.0, 1.0))
    none = torch.zeros(2, 0, dtype=torch.bool)
    alike = torch.zeros(2, 2, dtype=torch.bool)
    empty = unit((1.0, 0.0))
    loss = clap.contrastive_loss(same, same, torch.zeros(2, 0, 2), none, alike, torch.tensor(3.0), empty)
    plain = math.log(1 + math.exp(-3.0))
    twin = math.log(2 + math.exp(-3.0))  # the first caption scores 3 with its clip and with the empty one
    other = math.log(1 + 2 * math.exp(-3.0))
    assert float(loss) == pytest.approx(0.5 * (plain + (twin + other) / 2), rel=1e-6)


def test_a_caption_that_can_not_be_read_has_words_of_templates_and_unknown_ones_only() -> None:
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    for _ in range(100):
        caption = clap.unread_caption(rng)
        assert tokenizer.unk_token_id in tokenizer(caption)["input_ids"]
        assert not set(caption.split()) & set(word_classes())


def test_clips_that_one_caption_describes_are_no_negatives_of_each_other() -> None:
    swapped = CaptionTruth(classes=("siren", "dog"), relation="then")
    turned = CaptionTruth(classes=("siren", "dog"), relation="while")
    alike = clap.same_caption([THEN, THEN, swapped, WHILE, turned])
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for a, b in ((0, 1), (3, 4)):
        expected[a, b] = expected[b, a] = True
    assert torch.equal(alike, expected)


@pytest.mark.parametrize(("truth", "count"), [(THEN, 3), (WHILE, 2), (SINGLE, 1)])
def test_captions_and_their_negatives_are_of_the_training_split(truth: CaptionTruth, count: int) -> None:
    captions = clap.draw_captions(truth, np.random.default_rng(0))
    assert len(captions.negatives) == count
    assert all(split_of(caption) == "train" for caption in (captions.true, *captions.negatives))


def test_the_tokenizer_knows_every_word_of_the_grammar() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(words()) + 4
    ids = tokenizer("A dog barks, then rain falls")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2) and tokenizer.unk_token_id not in ids
    assert tokenizer.pad_token_id == 1 and tokenizer.model_max_length == TEXT_LENGTH


def test_the_sentences_token_is_labelled_with_the_first_event() -> None:
    tokenizer = build_tokenizer()
    for seed in range(30):
        ids, labels = parsing.labelled_caption(np.random.default_rng(seed), tokenizer)
        assert len(ids) == len(labels) <= TEXT_LENGTH
        assert (ids[0], ids[-1], labels[-1]) == (0, 2, parsing.IGNORED)
        told = {label for label in labels[1:] if label != parsing.IGNORED}
        assert labels[0] == parsing.IGNORED or labels[0] in told


def test_a_step_of_the_training_reaches_sound_and_text() -> None:
    model = clap.build(build_tokenizer()).train()
    scenes = [make_scene(1, index, SceneConfig()) for index in range(4)]
    loss, figures = clap.loss_of(model, scenes, np.random.default_rng(0))
    loss.backward()
    assert 0 <= figures["retrieved"] <= 1
    for part in (model.clap.audio_model, model.clap.text_model):
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters())


def test_the_shipped_models_hear_what_and_not_when() -> None:
    """The model card's figures, on few clips. CLAP is as weak on order here as in the literature."""
    figures = evaluate_clap.evaluate(load_clap(mini_folder("clap-a")), 60, evaluate_clap.SCENES)
    against = figures["against"]
    assert isinstance(against, dict)
    assert against["missing"][0] > 0.9 and against["replaced"][0] > 0.9
    assert 0.2 < against["swapped"][0] < 0.8
    empty = figures["above_empty"]
    assert isinstance(empty, dict) and set(empty) == set(BACKGROUNDS)
    assert min(share for share, _, _ in empty.values()) > 0.95


@pytest.mark.parametrize("kind", [*BACKGROUNDS, "swapped"])
def test_the_shipped_reward_model_prefers_the_right_clip_to_none_and_to_the_reverse(kind: str) -> None:
    folder = mini_folder("clap-a")
    reward = load_reward(mini_folder("reward"), load_clap(folder), verify_manifest(folder).digest)
    accuracy = pair_accuracy(reward_score(reward), real_pairs(kind, 16))
    assert accuracy is not None and accuracy[0] > 0.9


@pytest.mark.parametrize("prompt", ["A toilet flushes", "a zebra brays and a crowd cheers"])
def test_the_shipped_models_say_what_they_can_not_read(prompt: str) -> None:
    for name in ("clap-a", "clap-b"):
        model = load_clap(mini_folder(name))
        assert not model.reads(prompt)
        assert model.reads("church bells") and model.reads("A DOG barks!")


def test_pairs_are_counted_by_prompt() -> None:
    pairs = [("a", np.ones(4, np.float32), np.zeros(4, np.float32))] * 3
    pairs.append(("b", np.zeros(4, np.float32), np.ones(4, np.float32)))
    result = pair_accuracy(lambda _, clips: torch.tensor([float(clip.sum()) for clip in clips]), pairs)
    assert result is not None
    assert result[0] == pytest.approx(0.75)
    assert result[1] <= result[0] <= result[2]
    assert pair_accuracy(lambda _, clips: torch.zeros(len(clips)), []) is None


def test_real_pairs_are_of_held_out_prompts_and_differ_in_their_clips() -> None:
    pairs = real_pairs("swapped", 3)
    assert len(pairs) == 3
    assert all(split_of(prompt) == "validation" for prompt, _, _ in pairs)
    assert all(not np.array_equal(chosen, rejected) for _, chosen, rejected in pairs)
    assert all(a[0] != b[0] for a, b in pairwise(pairs))
