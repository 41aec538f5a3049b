import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.errors import ModelFormatError, ModelNotFoundError
from tests.training.preferences.test_perturb import Endpoint, completion, endpoint
from training.captioning.paraphrase import (
    PARAPHRASED,
    GrammarParaphraser,
    LLMParaphraser,
    ParaphraseConfig,
    paraphrase_captions,
)
from training.commands.main import train as train_app
from training.data.captions import read_examples
from training.data.store import read_rows
from training.preferences.local_chat import LocalChat
from training.preferences.perturbation import BadAnswerError
from training.soundworld.reading import grammar_reader
from training.soundworld.scenes import split_of

__all__ = ["endpoint"]  # a fixture

CAPTION = "A dog barks then a siren wails"


def answer(*texts: str) -> bytes:
    return completion(json.dumps({"captions": [{"text": text} for text in texts]}))[2]


def write_list(folder: Path, *captions: str) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"key": f"k{n}", "source": f"{n}.wav", "target": text} for n, text in enumerate(captions)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "captions.jsonl"


def test_the_grammar_words_the_same_events_in_other_ways() -> None:
    reader, paraphraser = grammar_reader(), GrammarParaphraser(seed=1)
    for caption in (CAPTION, "a bell tolls while rain falls", "A cat meowing"):
        found = paraphraser.paraphrase(caption, 3)
        assert 1 <= len(found) <= 3
        assert len(set(found)) == len(found)
        for text in found:
            assert text.lower() != caption.lower()
            assert split_of(text) == "train"
            assert reader.read(text).steps == reader.read(caption).steps
        assert found == paraphraser.paraphrase(caption, 3)
    with pytest.raises(BadAnswerError, match="is no caption of the sound world: 'toilet flushes'"):
        paraphraser.paraphrase("A toilet flushes", 1)


def test_a_language_model_translates_there_and_back(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.default = lambda body: (200, {}, answer("A dog is barking, after which a siren wails", CAPTION))
    paraphraser = LLMParaphraser(endpoint.config, "back-translation", tmp_path)
    assert paraphraser.paraphrase(CAPTION, 1) == ["A dog is barking, after which a siren wails"]
    message = endpoint.requests[0]["messages"][1]["content"]
    assert "Chinese" in message
    assert json.dumps(CAPTION) in message
    assert paraphraser.paraphrase(CAPTION, 1)
    assert len(endpoint.requests) == 1  # from the cache


def test_useless_answers_are_asked_for_again_then_skipped(endpoint: Endpoint, tmp_path: Path) -> None:
    # The caption itself, one that is far too long, and no JSON.
    bad = [answer(CAPTION), answer("a very " * 40), b'{"choices": []}']
    endpoint.answers = [(200, {}, one) for one in bad]
    with pytest.raises(BadAnswerError, match="does not fit the schema"):
        LLMParaphraser(endpoint.config, "paraphrase", tmp_path).paraphrase(CAPTION, 1)
    assert len(endpoint.requests) == 3


def test_the_stage_writes_lines_that_training_reads(tmp_path: Path) -> None:
    source = write_list(tmp_path / "data", CAPTION, "A toilet flushes", CAPTION)
    config = ParaphraseConfig(source=source, paraphraser="grammar", count=2)
    report = paraphrase_captions(config, tmp_path / "out")
    assert (report["captions"], report["made"], report["without_any"]) == (3, 4, 1)
    assert report["bad"][0]["caption"] == "A toilet flushes"
    rows = read_rows(tmp_path / "out" / PARAPHRASED)
    assert [row["key"] for row in rows] == [
        "k0_paraphrase1",
        "k0_paraphrase2",
        "k2_paraphrase1",
        "k2_paraphrase2",
    ]
    (tmp_path / "data" / "0.wav").touch()
    first = read_examples(tmp_path / "out" / PARAPHRASED)[0]
    assert first.clip == read_examples(source)[0].clip or first.clip.name.endswith("data/0.wav")
    assert paraphrase_captions(config, tmp_path / "out") == report


def test_the_command_names_the_file(tmp_path: Path) -> None:
    source = write_list(tmp_path / "data", CAPTION)
    arguments = ["paraphrase", str(source), "--set", "paraphraser=grammar", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(train_app, arguments)
    assert result.exit_code == 0, result.output
    assert f"1 paraphrases of 1 captions: {tmp_path / 'out' / PARAPHRASED}" in result.output.replace("\n", "")


def test_a_local_model_must_be_a_chat_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a folder"):
        LocalChat(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFormatError, match="can't be loaded"):
        LocalChat(tmp_path / "empty")
