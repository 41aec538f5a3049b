import json
from pathlib import Path

import pytest

from services.api.reading import EVENTS, EventReader, compare, events_json, normalised, read_events
from services.errors import ModelFormatError

WORDINGS = {
    "dog": ["a dog barks", "a dog barking", "dogs bark"],
    "siren": ["a siren wails"],
    "rain": ["rain falls", "rain falls hard"],
}
TEMPLATES = [
    (["", ""], [[0]]),
    (["", " then ", ""], [[0], [1]]),
    (["", ", after ", ""], [[1], [0]]),
    (["before ", ", ", ""], [[1], [0]]),
    (["", " while ", ""], [[0, 1]]),
]
READER = EventReader.of(WORDINGS, TEMPLATES)


@pytest.mark.parametrize(
    ("caption", "events", "steps", "unread"),
    [
        ("A dog barks.", ("dog",), [{"dog"}], ""),
        ("The dog barks, then a SIREN wails!", ("dog", "siren"), [{"dog"}, {"siren"}], ""),
        ("a siren wails after dogs bark", ("siren", "dog"), [{"dog"}, {"siren"}], ""),
        ("Before rain falls, a dog barks", ("rain", "dog"), [{"dog"}, {"rain"}], ""),
        ("Rain falls hard while a dog is barking", ("rain",), [{"rain"}], "while dog is barking"),
        ("rain falls while a siren wails", ("rain", "siren"), [{"rain", "siren"}], ""),
        (
            "a dog barks then a siren wails while rain falls",
            ("dog", "siren", "rain"),
            [{"dog"}, {"siren", "rain"}],
            "",
        ),
        ("a dog barks or a siren wails", ("dog", "siren"), None, "or"),
        ("a dog barks then a dog barks", ("dog",), None, ""),
        ("a church organ", (), None, "church organ"),
        ("underdogs bark", (), None, "underdogs bark"),
        ("", (), None, ""),
    ],
)
def test_a_caption_has_events_an_order_and_words_that_are_not_read(
    caption: str, events: tuple[str, ...], steps: list[set[str]] | None, unread: str
) -> None:
    reading = READER.read(caption)
    assert reading.events == events
    assert (None if reading.steps is None else list(map(set, reading.steps))) == steps
    assert reading.unread == unread


@pytest.mark.parametrize(
    ("prompt", "caption", "words"),
    [
        ("a dog barks then a siren wails", "a siren wails, after a dog barks", ()),
        ("a dog barks while a siren wails", "a siren wails while a dog barks", ()),
        ("a dog barks then a siren wails", "a dog barks", ("missing: siren",)),
        ("a dog barks", "a siren wails while rain falls", ("missing: dog", "added: siren, rain")),
        (
            "a dog barks then a siren wails",
            "a siren wails then a dog barks",
            ("other order: siren then dog, not dog then siren",),
        ),
        (
            "a dog barks while a siren wails",
            "a dog barks then a siren wails",
            ("other order: dog then siren, not dog while siren",),
        ),
        # An event too many does not change the order of the others.
        (
            "a dog barks then a siren wails",
            "a dog barks then rain falls then a siren wails",
            ("added: rain",),
        ),
        (
            "a dog barks then a siren wails",
            "a dog barks or a siren wails",
            ("other order: dog, siren in an order that the caption does not state, not dog then siren",),
        ),
    ],
)
def test_two_captions_differ_in_events_and_their_order(
    prompt: str, caption: str, words: tuple[str, ...]
) -> None:
    comparison = compare(READER.read(prompt), READER.read(caption))
    assert comparison.in_words() == words
    several = not comparison.missing and len(comparison.wanted.events) > 1
    assert comparison.in_order == (words[-1:] == () or "order" not in words[-1] if several else None)


def test_a_long_caption_is_read_in_bounded_time() -> None:
    reading = READER.read("a dog barks then " * 20_000)
    assert reading.events == ("dog",)
    assert normalised("x" * 100_000) == "x" * 100_000


def test_the_file_of_a_captioner_gives_the_same_reader(tmp_path: Path) -> None:
    assert read_events(tmp_path) is None
    (tmp_path / EVENTS).write_text(events_json(WORDINGS, TEMPLATES))
    assert read_events(tmp_path) == READER


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        json.dumps({"events": {"dog": ["a dog barks"]}}),
        json.dumps({"events": {"dog": ["a dog"], "cat": ["the dog"]}, "templates": []}),
        json.dumps({"events": {"dog": [" "]}, "templates": []}),
        json.dumps({"events": {}, "templates": []}),
        json.dumps({"events": {"dog": ["dogs"]}, "templates": [{"links": ["", "", ""], "steps": [[0]]}]}),
        json.dumps(
            {
                "events": {"dog": ["a dog barks"]},
                "templates": [
                    {"links": ["", "then", ""], "steps": [[0], [1]]},
                    {"links": ["", ", then", ""], "steps": [[1], [0]]},
                ],
            }
        ),
    ],
)
def test_a_file_that_is_no_list_of_events_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / EVENTS).write_text(content)
    with pytest.raises(ModelFormatError, match=r"events\.json is no list of events"):
        read_events(tmp_path)
