import numpy as np
import pytest

from training.preferences.rules import RulePerturber, form_of, parse, world_class
from training.soundworld.captions import words
from training.soundworld.scenes import SceneConfig, draw_caption

AUDIOCAPS = (
    "A man is speaking then a sewing machine briefly turns on and off",
    "People cheering and race cars racing by",
    "A man and a woman speak while a dog barks loudly in the distance.",
    "Birds chirp, then a car engine starts and revs",
    "A horn honks as a train passes by, followed by a bell ringing",
    "Loud music playing with people talking in the background",
    "Water flows and splashes",
    "A man speaks and then laughs",
)


def _world(count: int, **kinds: float) -> list[str]:
    config = SceneConfig(**({"single": 0.2, "sequence": 0.5} | kinds))  # type: ignore[arg-type]
    return [draw_caption(np.random.default_rng([1, i]), config)[0] for i in range(count)]


def test_parsing_puts_every_caption_together_again() -> None:
    for caption in (*AUDIOCAPS, *_world(300)):
        assert parse(caption).text() == caption


@pytest.mark.parametrize(
    ("caption", "events"),
    [
        (AUDIOCAPS[0], ("a man is speaking", "a sewing machine briefly turns on and off")),
        (AUDIOCAPS[2], ("a man and a woman speak", "a dog barks loudly in the distance")),
        (AUDIOCAPS[3], ("birds chirp", "a car engine starts and revs")),
        (AUDIOCAPS[4], ("a horn honks", "a train passes by", "a bell ringing")),
        (AUDIOCAPS[7], ("a man speaks", "laughs")),
        ("After rain falls, an engine idles", ("rain falls", "an engine idles")),
        ("A dog barks", ("a dog barks",)),
        ("", ("",)),
    ],
)
def test_events_are_cut_at_connectives_and_not_inside(caption: str, events: tuple[str, ...]) -> None:
    if caption:
        assert parse(caption).events == events


def test_forms() -> None:
    assert [form_of(text) for text in ("a dog barks", "race cars racing by", "loud music")] == [
        "finite",
        "gerund",
        "phrase",
    ]
    assert form_of("a sewing machine briefly turns on") == "finite"
    assert form_of("a dog barking at cars") == "gerund"


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        (
            "A dog barks then a siren wails",
            {"A siren wails then a dog barks", "A dog barks after a siren wails"},
        ),
        ("A dog barking followed by a bell ringing", {"A bell ringing followed by a dog barking"}),
        ("A dog barks before rain falls", {"Rain falls before a dog barks", "A dog barks after rain falls"}),
        (
            "After rain falls, an engine idles",
            {"After an engine idles, rain falls", "Before rain falls, an engine idles"},
        ),
        ("A bell rings and a bird chirps", set()),
        ("A man speaks and then laughs", set()),
    ],
)
def test_swaps_turn_the_order_of_time_round(caption: str, swapped: set[str]) -> None:
    perturber = RulePerturber([caption], kinds={"2": (), "3": ("swap",)})
    assert {one.text for one in perturber.perturb(caption, "3", 5)} == swapped


def test_removals_leave_sentences() -> None:
    perturber = RulePerturber([], kinds={"2": (), "3": ("remove",)})

    def removed(caption: str) -> set[str]:
        return {one.text for one in perturber.perturb(caption, "3", 9)}

    assert removed("After rain falls, an engine idles.") == {"Rain falls.", "An engine idles."}
    assert removed("A dog barks then a siren wails, followed by a bell ringing") == {
        "A siren wails, followed by a bell ringing",
        "A dog barks, followed by a bell ringing",
        "A dog barks then a siren wails",
    }
    assert removed("A man speaks and then laughs") == {"A man speaks"}
    assert removed("A dog barks") == set()


def test_the_sound_world_stays_within_its_words_and_gets_other_events() -> None:
    captions = _world(200)
    perturber = RulePerturber(captions)
    known = set(words())
    for caption in captions:
        for strategy in ("2", "3"):
            found = perturber.perturb(caption, strategy, 5)
            assert found
            assert len({one.text for one in found} | {caption}) == len(found) + 1
            own = {world_class(event) for event in parse(caption).events}
            assert None not in own
            for one in found:
                assert set(one.text.lower().replace(",", " , ").split()) <= known
                there = {world_class(event) for event in parse(one.text).events}
                assert None not in there
                # What comes in is of another class, not the same sound in other words.
                assert len(there - own) == (one.kind in ("add", "replace"))
                assert own & there, "nothing of the caption is left"


def test_close_wordings_keep_length_and_concepts() -> None:
    perturber = RulePerturber(AUDIOCAPS)
    for caption in AUDIOCAPS:
        rewordings = [one.text for one in perturber.perturb(caption, "2", 5) if one.kind == "reword"]
        for text in rewordings:
            changed = set(text.lower().split()) ^ set(caption.lower().split())
            assert 0 < len(changed) <= 3
    assert any(one.kind == "reword" for one in perturber.perturb(AUDIOCAPS[1], "2", 5))
    articles = RulePerturber([], kinds={"2": ("reword",), "3": ()}).perturb("An old engine runs", "2", 5)
    assert {one.text for one in articles} == {f"An old {name} runs" for name in ("drill", "pump", "chainsaw")}


def test_the_same_seed_gives_the_same_and_another_one_others() -> None:
    captions = _world(40)
    first, again = RulePerturber(captions), RulePerturber(reversed(captions))
    other = RulePerturber(captions, seed=1)
    assert [first.perturb(c, "3", 4) for c in captions] == [again.perturb(c, "3", 4) for c in captions]
    assert [first.perturb(c, "3", 4) for c in captions] != [other.perturb(c, "3", 4) for c in captions]
