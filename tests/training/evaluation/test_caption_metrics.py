import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.errors import InvalidInputError, MilongaError
from training.commands.main import train as train_app
from training.evaluation.caption_metrics import METRICS, TEXT, evaluate_captions
from training.soundworld.reading import grammar_reader

REFERENCES = {
    "a.wav": ["A dog barks then a siren wails", "A siren wails after a dog barks"],
    "b.wav": ["Rain falls while a bell tolls", "A bell tolls and rain falls"],
    "c.wav": ["A cat meows", "A kitten is crying"],
    "d.wav": ["An engine idles followed by a horn honking", "A motor runs, then a car honks"],
}


def write_list(path: Path, captions: dict[str, list[str]]) -> Path:
    rows = [
        {"key": name, "source": f"x/{name}", "target": text}
        for name, texts in captions.items()
        for text in texts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def firsts(**changes: str) -> dict[str, list[str]]:
    return {name: [changes.get(name[0], texts[0])] for name, texts in REFERENCES.items()}


@pytest.fixture
def references(tmp_path: Path) -> Path:
    return write_list(tmp_path / "references.jsonl", REFERENCES)


def test_perfect_captions_score_highest(references: Path, tmp_path: Path) -> None:
    report = evaluate_captions(write_list(tmp_path / "own.jsonl", firsts()), references, metrics=TEXT)
    figures = report["figures"]
    assert list(figures) == list(TEXT)
    assert figures["bleu_1"]["value"] == pytest.approx(1, abs=1e-6)
    assert figures["rouge_l"]["value"] == pytest.approx(1, abs=1e-6)
    assert figures["cider_d"]["value"] > 2
    assert (report["clips"], report["references"]) == (4, 8)
    worse = evaluate_captions(
        write_list(tmp_path / "worse.jsonl", firsts(a="A siren wails", d="Thunder rumbles")),
        references,
        metrics=TEXT,
    )["figures"]
    for name in TEXT:
        assert worse[name]["value"] < figures[name]["value"]
        assert worse[name]["low"] <= worse[name]["value"] <= worse[name]["high"]


def test_cider_is_that_of_a_case_worked_by_hand(tmp_path: Path) -> None:
    # Two clips, one reference each, captions of one word: only 1-grams, tf-idf weight log(2) each, cosine 1
    # or 0, no penalty of length; the mean over n = 1…4 gives 10 / 4 for the right one.
    true = {"a.wav": ["barking"], "b.wav": ["raining"]}
    made = {"a.wav": ["barking"], "b.wav": ["snowing"]}
    report = evaluate_captions(
        write_list(tmp_path / "made.jsonl", made),
        write_list(tmp_path / "true.jsonl", true),
        metrics=["cider_d"],
    )
    assert report["figures"]["cider_d"]["value"] == pytest.approx(1.25)


def test_case_and_punctuation_do_not_count(references: Path, tmp_path: Path) -> None:
    changed = {name: [texts[0].upper() + "!"] for name, texts in REFERENCES.items()}
    report = evaluate_captions(write_list(tmp_path / "own.jsonl", changed), references, metrics=["bleu_4"])
    assert report["figures"]["bleu_4"]["value"] == pytest.approx(1, abs=1e-6)


def test_events_are_compared_where_a_captioner_names_them(references: Path, tmp_path: Path) -> None:
    captions = firsts(
        a="A siren wails then a dog barks",
        b="Rain falls",
        c="A cat meowing loudly",
        d="A horn honks then a bird sings",
    )
    report = evaluate_captions(
        write_list(tmp_path / "own.jsonl", captions), references, metrics=["rouge_l"], events=grammar_reader()
    )
    values = {name: figure["value"] for name, figure in report["figures"].items()}
    assert values["events_named"] == 0.5
    assert values["order_given_events"] == 0
    assert values["nothing_added"] == 0.75
    assert values["read_whole"] == 0.75


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"a.wav": ["one", "two"]}, r"several captions for 1 clips \(a\.wav\)"),
        ({**firsts(), "z.wav": ["x"]}, r"references\.jsonl has no caption for 1 clips \(z\.wav\)"),
        ({"a.wav": ["x"]}, r"own\.jsonl has no caption for 3 clips \(b\.wav, c\.wav, d\.wav\)"),
    ],
)
def test_lists_of_other_clips_are_refused(
    references: Path, tmp_path: Path, captions: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        evaluate_captions(write_list(tmp_path / "own.jsonl", captions), references)


def test_one_clip_is_too_few_and_equal_names_are_ambiguous(tmp_path: Path) -> None:
    one = write_list(tmp_path / "one.jsonl", {"a.wav": ["x"]})
    with pytest.raises(InvalidInputError, match="give 2 or more"):
        evaluate_captions(one, one)
    rows = [{"source": f"{folder}/a.wav", "target": "x"} for folder in "xy"]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidInputError, match=r"two clips named a\.wav"):
        evaluate_captions(tmp_path / "two.jsonl", one)


def test_metrics_that_need_downloads_say_so(
    references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AAC_METRICS_CACHE_PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("AAC_METRICS_JAVA_PATH", "no-such-java")
    captions = write_list(tmp_path / "own.jsonl", firsts())
    for metric, advice in (
        ("meteor", "meteor-1.5.jar"),
        ("spice", "Stanford CoreNLP"),
        ("spider", "Stanford CoreNLP"),
    ):
        with pytest.raises(MilongaError, match=f"can't be computed.*{advice}"):
            evaluate_captions(captions, references, metrics=[metric])
    report = evaluate_captions(captions, references)
    assert list(report["figures"]) == list(TEXT)
    assert report["not_computed"] == [name for name in METRICS if name not in TEXT]
    assert report["tokenizer"] == "words"
    with pytest.raises(InvalidInputError, match="has bleu, must be of cider_d"):
        evaluate_captions(captions, references, metrics=["bleu"])


def test_the_command_prints_a_line_per_metric(references: Path, tmp_path: Path) -> None:
    captions = write_list(tmp_path / "own.jsonl", firsts())
    arguments = ["evaluate-captions", str(captions), str(references), "--metrics", "cider_d,rouge_l"]
    result = CliRunner().invoke(train_app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("4 clips, 8 references")
    assert [line.split()[0] for line in lines[1:3]] == ["cider_d", "rouge_l"]
    assert json.loads(CliRunner().invoke(train_app, [*arguments, "--json"]).output)["clips"] == 4
