import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from services.models.words import is_readable, prompt_warnings, split_words, unknown_words, warnings_of
from tests.tiny import tiny_clap, tiny_clap_tokenizer, tiny_tokenizer

FRENCH, JAPANESE, EMOJI = "Le chien aboie", "犬が吠える", "a dog barks 🐕"


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE as RoBERTa's, which merges the bytes of é but of no other character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pair = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")[0][0]
    tokens = ["<pad>", "<unk>", *alphabet, pair]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, [(pair[0], pair[1])], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A dog barks, then (softly) rain.", ["A", "dog", "barks", "then", "softly", "rain"]),
        ("it's a well-known 'cat'", ["it's", "a", "well-known", "cat"]),
        ("¿Qué? «chien» — 犬、猫。", ["Qué", "chien", "犬", "猫"]),
        ("कुत्ता भौंकता है", ["कुत्ता", "भौंकता", "है"]),
        ("a dog🐕!", ["a", "dog🐕"]),
        ("👩‍🚒 siren", ["👩‍🚒", "siren"]),
        ("... - !", []),
    ],
)
def test_words_are_without_punctuation(prompt: str, words: list[str]) -> None:
    assert split_words(prompt) == words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a dog barks", ()),
        ("", ()),
        ("A Zebra barks, then a zebra-like Zebra sings; rain.", ("Zebra", "zebra-like")),
        (FRENCH, ("Le", "chien", "aboie")),
        (JAPANESE, (JAPANESE,)),
        (EMOJI, ("🐕",)),
    ],
)
def test_words_that_a_word_list_lacks_are_named_once_in_order(prompt: str, words: tuple[str, ...]) -> None:
    for tokenizer in (tiny_tokenizer(), tiny_clap_tokenizer()):
        assert unknown_words(tokenizer, prompt) == words


def test_a_tokenizer_of_bytes_knows_the_characters_that_it_does_not_split(
    byte_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert unknown_words(byte_tokenizer, "a zebra in a café barks 🐕, 犬") == ("🐕", "犬")


def test_a_long_list_of_unknown_words_is_cut() -> None:
    prompt = " ".join([f"q{number}" for number in range(25)] + ["z" * 100])
    (warning, _) = prompt_warnings(tiny_clap_tokenizer(), prompt, 8)
    assert warning.startswith("has words that the model does not know: q0, q1, ")
    assert "q9 and 16 more, and none for a sound that it knows; use" in warning
    (long,) = prompt_warnings(tiny_clap_tokenizer(), "z" * 100, 8)
    assert f": {'z' * 40}, and none" in long


def test_a_truncated_prompt_is_warned_of_from_the_first_token_that_is_not_read() -> None:
    tokenizer = tiny_clap_tokenizer()
    assert prompt_warnings(tokenizer, "a dog barks", 5) == ()
    assert prompt_warnings(tokenizer, "a dog barks", 4) == (
        "has 5 tokens and the model reads the first 4; shorten it",
    )


def test_models_that_disagree_are_named() -> None:
    models = {"a": lambda prompt: (f"x {prompt}", "y"), "b": lambda prompt: (f"x {prompt}",)}
    assert warnings_of(models, ["1", "2", "1"]) == [("x 1", "y (a)"), ("x 2", "y (a)"), ("x 1", "y (a)")]


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Switch threads as often as possible, so that races show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_warnings_and_embeddings_on_several_threads_do_not_change_each_other() -> None:
    clap = tiny_clap()
    prompts = ["a dog " * count for count in range(1, 40)]
    expected = [(clap.prompt_warnings(prompt), clap.text_features([prompt])) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        warned = [pool.submit(clap.prompt_warnings, prompt) for prompt in prompts * 5]
        embedded = [pool.submit(clap.text_features, [prompt]) for prompt in prompts * 5]
        found = [(one.result(), two.result()) for one, two in zip(warned, embedded, strict=True)]
    for (warnings, embedding), (right, features) in zip(found, expected * 5, strict=True):
        assert warnings == right
        torch.testing.assert_close(embedding, features)


@pytest.mark.parametrize(
    ("prompt", "readable"),
    [
        ("a dog barks", True),
        ("a loud dog", True),
        ("A zebra brays", False),
        ("the sound of two zebras in the background", False),
        ("no zebra", False),
        ("then", True),
        ("...", False),
    ],
)
def test_a_prompt_is_readable_if_a_word_for_a_sound_is_known(prompt: str, readable: bool) -> None:
    assert is_readable(tiny_clap_tokenizer(), prompt) == readable
    found = prompt_warnings(tiny_clap_tokenizer(), prompt, 40)
    assert any("none for a sound that it knows" in one for one in found) == (not readable and prompt != "...")


def test_a_tokenizer_of_bytes_reads_all_words_but_those_that_it_splits(
    byte_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert is_readable(byte_tokenizer, "A zebra brays")
    assert not is_readable(byte_tokenizer, JAPANESE)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("No dog barks, not even rain without a siren", "No, not, without"),
        ("A dog doesn't bark", "doesn't"),
        ("nobody isn’t there", "nobody, isn’t"),
    ],
)
def test_negations_are_warned_of(prompt: str, words: str) -> None:
    (warning, *_) = prompt_warnings(tiny_clap_tokenizer(), prompt, 40)
    assert warning.startswith(f"excludes something ({words}), which the model does not read as such;")


def test_words_that_only_look_like_negations_are_not() -> None:
    warnings = prompt_warnings(tiny_clap_tokenizer(), "A knot in an annotated tent", 40)
    assert not any("excludes" in one for one in warnings)
