"""Lists of clips with classes and no captions."""

import json
from pathlib import Path

import pytest

from services.errors import InvalidInputError
from services.lists import Entry, class_captions, class_phrase, read_list, read_wordings


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("dog_bark", "a dog bark"),
        ("DogBark", "a dog bark"),
        ("001 - Dog bark", "a dog bark"),
        ("engine", "an engine"),
        ("sea_waves", "sea waves"),
        ("fire_crackling", "fire crackling"),
        ("rain", "rain"),
        ("glass", "glass"),
        ("bus", "a bus"),
        ("a-dog", "a dog"),
        ("собака", "собака"),
        ("80s music", "80s music"),
    ],
)
def test_a_class_is_named_as_in_a_sentence(name: str, phrase: str) -> None:
    assert class_phrase(name) == phrase
    assert class_captions(name) == (
        phrase, f"the sound of {phrase}", f"you hear {phrase}", f"{phrase} can be heard",
    )  # fmt: skip


def read(tmp_path: Path, content: str, name: str = "clips.csv") -> list[Entry]:
    (tmp_path / name).write_text(content)
    return read_list(tmp_path / name, "--prompts")


def test_a_list_with_classes_has_their_captions(tmp_path: Path) -> None:
    entries = read(tmp_path, "file,class,fold\na.ogg,dog_bark,1\nb.ogg,rain,5\n")
    assert [(entry.location, entry.prompt) for entry in entries] == [
        (name, caption)
        for name, sound in (("a.ogg", "dog_bark"), ("b.ogg", "rain"))
        for caption in class_captions(sound)
    ]
    assert {entry.sound for entry in entries} == {"dog_bark", "rain"}
    assert entries[0].fields == {"fold": "1"}


def test_numbers_of_esc_50_are_no_captions(tmp_path: Path) -> None:
    entries = read(tmp_path, "filename,fold,target,category,take\na.wav,1,0,dog,A\n")
    assert [entry.prompt for entry in entries] == list(class_captions("dog"))


def test_captions_go_before_classes(tmp_path: Path) -> None:
    entries = read(tmp_path, "file,class,caption\na.wav,dog,A hound howls\n")
    assert [(entry.prompt, entry.sound) for entry in entries] == [("A hound howls", "dog")]
    with pytest.raises(InvalidInputError, match=r"clips\.csv:3: has no prompt"):
        read(tmp_path, "file,class,caption\na.wav,dog,A hound howls\nb.wav,dog,\n")


def test_a_list_of_numbers_has_no_captions(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has no column prompt"):
        read(tmp_path, "file,label\na.wav,0\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", json.dumps({"Dog bark": ["A dog barks", "A  hound howls"]})),
        ("captions.csv", "class,caption\ndog_bark,A dog barks\ndog_bark,A hound howls\n"),
    ],
)
def test_a_folder_may_bring_captions_of_its_classes(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    entries = read(tmp_path, "file,class\na.ogg,dog_bark\nb.ogg,rain\n")
    assert [entry.prompt for entry in entries] == ["A dog barks", "A hound howls", *class_captions("rain")]
    with pytest.raises(InvalidInputError, match=rf"{name}: names the class .*the classes are cat, rain"):
        read_wordings(tmp_path).check(["rain", "cat"])


def test_faulty_captions_of_classes_are_named(tmp_path: Path) -> None:
    for content, says in (
        ('{"dog": ["A dog barks", null]}', r"captions\.json: dog: has no prompt"),
        ('{"dog": " "}', r"captions\.json: dog: prompt is empty"),
        ('{"dog": {"a": 1}}', r"captions\.json: dog: prompt is .*, must be str"),
        ('{"dog": "A dog barks"', r"captions\.json:1: is no JSON"),
        ('{"dog": "A", "dog": "B"}', r"has the field 'dog' twice"),
    ):
        (tmp_path / "captions.json").write_text(content)
        with pytest.raises(InvalidInputError, match=says):
            read_wordings(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", '[{"audio": "a.wav", "caption": "A dog barks"}]'),
        ("captions.json", '{"location": "a.wav", "captions": "A dog barks"}'),
        ("captions.csv", "file_name,caption\na.wav,A dog barks\n"),
    ],
)
def test_a_list_of_clips_is_none_of_captions_of_classes(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_wordings(tmp_path).path is None
    assert [entry.prompt for entry in read_list(tmp_path / name, "--prompts")] == ["A dog barks"]
