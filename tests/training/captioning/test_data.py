import json
from pathlib import Path

import pytest

from services.errors import InvalidInputError
from services.models.captioner.model import Captioner
from services.models.mini import mini_folder
from training.captioning.data import CaptionData, WorldClips, load_examples
from training.soundworld.reading import grammar_reader, truth_reading
from training.soundworld.scenes import split_of


def test_all_captions_of_a_clip_are_in_one_split(tmp_path: Path) -> None:
    rows = [
        {"source": f"{n}.wav", "target": f"{word} sound number {n}"}
        for n in range(200)
        for word in ("A", "Another")
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_examples(CaptionData(train=(tmp_path / "list.jsonl",), held_out=0.2), {})
    train, held = ({e.clip for e in part} for part in (splits.train, splits.validation))
    assert not train & held
    assert len(train | held) == 200
    assert 20 < len(held) < 60
    assert len(splits.train) == 2 * len(train)


def test_a_validation_list_must_have_other_clips(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"source": "a.wav", "target": "A dog barks"}\n')
    data = CaptionData(train=(tmp_path / "train.jsonl",), validation=(tmp_path / "validation.jsonl",))
    with pytest.raises(InvalidInputError, match=r"has 1 clips of data\.train"):
        load_examples(data, {})
    with pytest.raises(InvalidInputError, match="has no example for train"):
        load_examples(CaptionData(), {})


def test_scenes_of_the_world_have_true_captions_of_their_split() -> None:
    config = WorldClips(scenes=12, held_out=6, rebuilt=0.5)
    splits = load_examples(CaptionData(world=config), {})
    assert (len(splits.train), len(splits.validation)) == (12, 6)
    assert splits == load_examples(CaptionData(world=config), {})
    for split, part in (("train", splits.train), ("validation", splits.validation)):
        for example in part:
            assert example.truth is not None
            assert split_of(example.caption) == split
            reading, wanted = grammar_reader().read(example.caption), truth_reading(example.truth)
            assert (set(reading.events), reading.steps) == (set(wanted.events), wanted.steps)
    assert {example.clip.domain for example in splits.train} == {"real", "rebuilt"}


def test_plain_captions_are_those_of_the_mini_captioner() -> None:
    splits = load_examples(
        CaptionData(world=WorldClips(scenes=40, held_out=1, rebuilt=0.0, wording="plain")), {}
    )
    tokenizer = Captioner.from_pretrained(mini_folder("captioner")).tokenizer
    for example in splits.train:
        assert example.truth is None  # so that it is not worded in another way
        assert tokenizer.unk_token_id not in tokenizer(example.caption)["input_ids"]
    captions = {example.caption for example in splits.train}
    assert {caption.replace(" while ", " then ").count(" then ") for caption in captions} == {0, 1, 2}
    assert "a dog barks" in " ".join(captions)
