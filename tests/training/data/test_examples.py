import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pytest
import soundfile
from pyarrow import parquet

from services.errors import InvalidInputError
from services.lists import find_audio
from training.data.examples import (
    Examples,
    FileClip,
    LabelledClip,
    Pair,
    check_prompts,
    counts,
    decode,
    read_labelled,
    read_pairs,
)


def wav(seconds: float = 0.2, level: float = 0.1, channels: int = 1) -> bytes:
    """A clip of noise."""
    samples = np.random.default_rng(0).standard_normal((round(seconds * 16_000), channels)) * level
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), 16_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_decoding_gives_channels_by_samples() -> None:
    waveform, rate = decode(wav(0.2, channels=2))
    assert waveform.shape == (2, 3200) and waveform.dtype == np.float32 and rate == 16_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a sound", "begins with 6e 6f 74 20, which is no WAV, FLAC or OGG file"),
        (wav(0.01), r"lasts 0.01 s, must last between 0.1 and 60 s"),
        (wav(61, level=0.0), r"lasts 61 s, must last between 0.1 and 60 s"),
        (wav(level=float("nan")), "holds NaN or infinity, first at sample 0"),
        (wav(level=8_000.0), r"16-bit integers: divide by 32768"),
        (wav()[: len(wav()) // 2], "is cut short: as WAV"),
    ],
)
def test_invalid_clips_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(content)


@pytest.mark.parametrize("as_lines", [False, True])
@pytest.mark.parametrize("names", [("captions", "location", "label"), ("prompt", "audio", "score")])
def test_batons_json_is_read_in_all_its_forms(tmp_path: Path, as_lines: bool, names: tuple[str, ...]) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    rows = [dict(zip(names, ("A dog barks", "a.wav", label), strict=True)) for label in (1, 0, "1", 0.75)]
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows)
    (tmp_path / "HD.json").write_text(text)
    examples = read_labelled(tmp_path / "HD.json")
    assert [example.label for example in examples] == [1, 0, 1, 0.75]
    assert examples[0].prompt == "A dog barks"
    assert examples[0].clip == FileClip(path=tmp_path / "a.wav")
    assert examples[0].clip.read()[1] == 16_000


def test_paths_of_another_machine_are_found_under_the_root(tmp_path: Path) -> None:
    (tmp_path / "2label" / "x").mkdir(parents=True)
    (tmp_path / "2label" / "x" / "1.wav").write_bytes(wav())
    found = tmp_path / "2label" / "x" / "1.wav"
    assert find_audio("/home/someone/data/2label/x/1.wav", tmp_path) == found
    assert find_audio("2label/x/1.wav", tmp_path) == found
    assert find_audio(str(found), Path("/nowhere")) == found
    assert find_audio("no/2.wav", tmp_path) == tmp_path / "no" / "2.wav"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"x\.json:1: is no JSON"),
        ("[]", r"data\.labelled: .*x\.json holds no prompts"),
        ("[3]", r"x\.json:1: must be an object"),
        (
            '[{"captions": "x", "location": "y"}]',
            r"x\.json:1: label or score or reward is None, must be 0 to 1",
        ),
        ('[{"captions": "x", "label": 1}]', "has no column audio, .* or chosen; it has captions, label"),
        ('{"captions": "x", "location": "y", "label": 2}', r"x\.json:1: label is 2, must be 0 to 1"),
        (
            '\n{"captions": "x", "location": "y", "score": "good"}',
            r"x\.json:2: score is 'good', must be 0 to 1",
        ),
    ],
)
def test_json_in_another_format_gives_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_labelled(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.json", "x.jsonl", "x.parquet"])
def test_labelled_clips_are_read_from_every_list(name: str, tmp_path: Path) -> None:
    rows = [{"caption": f"Rain {n}", "location": "a.wav", "label": n / 2} for n in range(3)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    path = tmp_path / name
    match path.suffix:
        case ".parquet":
            _write(path, columns)
        case ".json":
            path.write_text(json.dumps({"data": rows}))
        case ".jsonl":
            path.write_text("\r\n".join(map(json.dumps, rows)))
        case _:
            delimiter = "," if name == "x.csv" else "\t"
            lines = [columns, *(map(str, row.values()) for row in rows)]
            path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    found = [(one.prompt, one.clip.name, one.label) for one in read_labelled(path)]
    assert found == [(f"Rain {n}", str(tmp_path / "a.wav"), n / 2) for n in range(3)]


UNUSABLE = [None, "", " \n", "Rain\0", "x" * 1_001]
"""Prompts that nothing can be trained on."""


def test_unusable_prompts_of_pairs_are_left_out_by_row(tmp_path: Path) -> None:
    prompts = [*UNUSABLE[:2], "A dog\nbarks", *UNUSABLE[2:]]
    clips = [{"bytes": wav(), "path": None}] * len(prompts)
    _write(tmp_path / "x.parquet", {"prompt": prompts, "chosen": clips, "rejected": clips})
    unusable: dict[str, str] = {}
    (pair,) = read_pairs(tmp_path / "x.parquet", unusable=unusable)
    assert pair.prompt == "A dog barks"
    assert list(unusable) == [f"x.parquet, row {row}" for row in (0, 1, 3, 4, 5)]
    assert "has no prompt" in unusable["x.parquet, row 0"]
    assert "U+0000" in unusable["x.parquet, row 4"]
    with pytest.raises(
        InvalidInputError, match=r"x\.parquet, row 0: has no prompt; x\.parquet, row 1: prompt is"
    ):
        read_pairs(tmp_path / "x.parquet")


def test_unusable_prompts_of_labelled_clips_are_left_out_by_line(tmp_path: Path) -> None:
    rows = [{"captions": prompt, "location": "a.wav", "label": 1} for prompt in (*UNUSABLE, 7, "Rain")]
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, rows)))
    unusable: dict[str, str] = {}
    (example,) = read_labelled(tmp_path / "x.json", unusable=unusable)
    assert example.prompt == "Rain"
    assert list(unusable) == [f"x.json:{line}" for line in range(1, 7)]
    assert unusable["x.json:6"] == "prompt is 7, must be str"


@pytest.mark.parametrize("side", ["prompt", "chosen"])
@pytest.mark.parametrize("value", [b"A dog barks", 0, 1.5], ids=str)
def test_columns_that_are_no_text_are_refused_with_their_type(value: Any, side: str, tmp_path: Path) -> None:
    columns = {"prompt": ["Rain"], "chosen": ["a.wav"], "rejected": ["b.wav"], side: [value]}
    _write(tmp_path / "x.parquet", columns)
    kind = pyarrow.array([value]).type
    with pytest.raises(
        InvalidInputError, match=rf"data\.pairs: the column {side} of .* is {kind}, must be text"
    ):
        read_pairs(tmp_path / "x.parquet", unusable={})


def test_decoded_clips_are_refused_with_what_is_needed(tmp_path: Path) -> None:
    decoded = {"array": [0.1, 0.2], "sampling_rate": 16_000}
    _write(tmp_path / "x.parquet", {"prompt": ["a"], "chosen": ["a.wav"], "rejected": [decoded]})
    with pytest.raises(InvalidInputError, match=r"the column rejected of .*array.* must have bytes or path"):
        read_pairs(tmp_path / "x.parquet")


def test_clips_that_are_null_can_not_be_read(tmp_path: Path) -> None:
    _write(
        tmp_path / "x.parquet", {"prompt": ["a", "b"], "chosen": ["c.wav", None], "rejected": ["c.wav"] * 2}
    )
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        read_pairs(tmp_path / "x.parquet")[1].chosen.read()


def test_unusable_prompts_count_under_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    unusable = {"x.parquet, row 3": "has no prompt"}
    check_prompts(unusable, 9, 0.1)
    assert (
        "1 of 10 prompts are unusable and are left out:\n  x.parquet, row 3: has no"
        in capsys.readouterr().err
    )
    with pytest.raises(
        InvalidInputError, match=r"1 of 10 prompts are unusable, at most 5% may be: x\.parquet, row 3"
    ):
        check_prompts(unusable, 9, 0.05)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="can't be read"):
        read_labelled(tmp_path / "x.json")
    with pytest.raises(InvalidInputError, match="can't be read"):
        read_pairs(tmp_path / "x.parquet")


def _write(path: Path, columns: dict[str, list[Any]]) -> None:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def test_audio_alpacas_columns_are_read(tmp_path: Path) -> None:
    contents = [wav(level=0.1 * (n + 1)) for n in range(6)]
    clips = [{"bytes": content, "path": None} for content in contents]
    columns: dict[str, list[Any]] = {
        "prompt": list("abc"),
        "chosen": clips[:3],
        "rejected": clips[3:],
        "strategy": [1, 2, 3],
    }
    _write(tmp_path / "x.parquet", columns)
    pairs = read_pairs(tmp_path / "x.parquet")
    assert [(pair.prompt, pair.kind) for pair in pairs] == [
        ("a", "strategy 1"),
        ("b", "strategy 2"),
        ("c", "strategy 3"),
    ]
    # The third row is in the second group.
    expected, _ = decode(contents[5])
    np.testing.assert_array_equal(pairs[2].rejected.read()[0], expected)
    assert len({clip.digest for clip in Examples(pairs=tuple(pairs)).clips()}) == 6


def test_clips_of_a_pair_may_be_paths_and_the_strategy_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "c.wav").write_bytes(wav(level=0.3))
    struct = [{"bytes": None, "path": "c.wav"}, {"bytes": None, "path": None}]
    _write(tmp_path / "x.parquet", {"prompt": ["a", "b"], "chosen": ["c.wav", "d.wav"], "rejected": struct})
    first, second = read_pairs(tmp_path / "x.parquet")
    assert first.kind == "preferred"
    assert first.chosen.digest == first.rejected.digest
    with pytest.raises(FileNotFoundError):
        second.chosen.read()
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        second.rejected.read()


def test_parquet_without_the_columns_gives_a_one_line_error(tmp_path: Path) -> None:
    _write(tmp_path / "x.parquet", {"prompt": ["a"], "clip": ["b"]})
    with pytest.raises(InvalidInputError, match=r"has no column chosen, rejected; it has prompt, clip"):
        read_pairs(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInputError, match="can't be read"):
        read_pairs(tmp_path / "y.parquet")


def _clip(name: str) -> FileClip:
    return FileClip(path=Path(name))


def test_without_pairs_the_labels_of_a_prompt_give_pairs() -> None:
    labelled = tuple(
        LabelledClip(prompt=prompt, clip=_clip(name), label=label)
        for prompt, name, label in (("a", "1", 1), ("a", "2", 0), ("a", "3", 0), ("b", "4", 1), ("c", "5", 0))
    )
    pairs = Examples(labelled=labelled).preference_pairs()
    assert [(p.prompt, p.chosen.name, p.rejected.name) for p in pairs] == [("a", "1", "2"), ("a", "1", "3")]
    own = (Pair(prompt="x", chosen=_clip("6"), rejected=_clip("7"), kind="swapped"),)
    both = Examples(labelled=labelled, pairs=own)
    assert both.preference_pairs() == own
    assert counts(both) == {"liked": 2, "not liked": 3, "swapped": 1}
    left = both.without({_clip("1"), _clip("7")})
    assert len(left.labelled) == 4 and not left.pairs
