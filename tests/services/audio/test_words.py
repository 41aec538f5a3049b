import pytest

from services.audio.words import find_phrase, find_words


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A dog barks, then a siren wails.", ["A", "dog", "barks", "then", "a", "siren", "wails"]),
        ("the dog's 'rock-'n'-roll' 🐕!", ["the", "dog's", "rock-'n'-roll", "🐕"]),
        ("  -- … '' ", []),
        ("犬が吠える、雨", ["犬が吠える", "雨"]),
    ],
)
def test_words_are_found_where_they_are(prompt: str, expected: list[str]) -> None:
    words = find_words(prompt)
    assert [word.text for word in words] == expected
    assert [prompt[word.start : word.end] for word in words] == expected


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("DOG", [1, 5]),
        ("a dog", [0, 1, 4, 5]),
        ("dog, barks", [1, 2]),
        ("barks dog", []),
        ("cat", []),
        (" … ", []),
        ("a dog barks then a dog growls loudly", []),
    ],
)
def test_a_phrase_is_found_at_each_place(phrase: str, expected: list[int]) -> None:
    words = ["A", "dog", "barks", "then", "a", "dog", "growls"]
    assert find_phrase(words, phrase) == expected
