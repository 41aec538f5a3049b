"""Lists as people have them: every format and every damage gives the same answer, by file and line."""

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from services.errors import InvalidInputError
from services.lists import Entry, caption_fault, find_audio, read_list

ROWS = [
    {"caption": 'A man says "hello", then a dog barks', "location": "a.wav"},
    {"caption": "Rain falls\nwhile thunder rumbles", "location": "b.wav"},
]
"""A comma, quotes and a line break."""
READ = [("Rain falls while thunder rumbles", "b.wav"), ('A man says "hello", then a dog barks', "a.wav")][
    ::-1
]


def captions(entries: list[Entry]) -> list[tuple[str, str | None]]:
    return [(entry.prompt, entry.location) for entry in entries]


def faults(path: Path, content: str | bytes, **options: Any) -> dict[str, str]:
    """What is wrong with a file, by place."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInputError) as caught:
        read_list(path, "--prompts", **options)
    assert "\n" not in str(caught.value)
    return {violation.field: violation.description for violation in caught.value.violations}


def table(delimiter: str) -> str:
    cells = [["caption", "location"], *([row["caption"], row["location"]] for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return "".join(delimiter.join(row) + "\n" for row in quoted)


FORMATS = {
    "a.csv": table(","),
    "semicolons.csv": table(";"),
    "spaces.csv": table(", "),
    "a.tsv": table("\t"),
    "tabs": table("\t"),
    "crlf.csv": table(",").replace("\n", "\r\n"),
    "a.jsonl": "\n\n".join(map(json.dumps, ROWS)),
    "crlf.jsonl": "".join(json.dumps(row) + "\r\n" for row in ROWS),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "no-suffix": "\n".join(map(json.dumps, ROWS)),
    "array.json": json.dumps(ROWS, indent=1),
    "compact.json": json.dumps(ROWS),
    "wavcaps.json": json.dumps({"num_captions_per_audio": 1, "data": ROWS, "blacklist": ["x"]}),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_captions(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name].encode(encoding))
    assert captions(read_list(tmp_path / name, "--prompts")) == READ


def test_parquet_gives_the_same_captions(tmp_path: Path) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    columns["caption"] = pa.array(columns["caption"]).dictionary_encode()
    pq.write_table(pa.table({**columns, "embedded": [{"bytes": b"x"}] * 2}), tmp_path / "a.parquet")
    entries = read_list(tmp_path / "a.parquet", "--prompts")
    assert captions(entries) == READ
    assert [entry.place for entry in entries] == ["a.parquet, row 0", "a.parquet, row 1"]


def test_standard_input_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (FORMATS["a.csv"], FORMATS["a.tsv"], FORMATS["a.jsonl"], FORMATS["array.json"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert captions(read_list(Path("-"), "--prompts")) == READ
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{}\n')))
    with pytest.raises(InvalidInputError, match="standard input:2: has no prompt"):
        read_list(Path("-"), "--prompts")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A dog barks\n")))
    with pytest.raises(InvalidInputError, match="standard input holds no prompts"):
        read_list(Path("-"), "--prompts")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", "\u001e"])
def test_json_lines_end_at_line_feeds_only(separator: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"A dog barks{separator}then rain falls"}, {"prompt": "Rain"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    if ord(separator) < 32:  # JSON has them escaped
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entries = read_list(tmp_path / "a.jsonl", "--prompts")
    assert [entry.prompt for entry in entries] == ["A dog barks then rain falls", "Rain"]


def test_a_mark_of_a_joined_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"prompt": "A"}\n\ufeff{"prompt": "B"}\n', encoding="utf-8")
    assert [entry.prompt for entry in read_list(tmp_path / "a.jsonl", "--prompts")] == ["A", "B"]


TABLE = "caption,location\nA dog barks,a.wav\nUn café,b.wav\n"


@pytest.mark.parametrize(
    "content",
    [
        TABLE.encode("utf-16"),
        TABLE.encode("utf-16-le"),
        TABLE.encode("utf-16-be"),
        TABLE.encode("utf-32"),
        TABLE.encode("utf-8-sig"),
        TABLE.replace("\n", "\r").encode(),
        ("sep=;\r\n" + TABLE.replace(",", ";")).encode(),
        TABLE.replace("caption,location", "Caption, LOCATION").encode(),
    ],
    ids=["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cr", "sep", "case"],
)
def test_tables_as_programs_write_them(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    entries = read_list(tmp_path / "a.csv", "--prompts")
    assert captions(entries) == [("A dog barks", "a.wav"), ("Un café", "b.wav")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_json_end_as_on_any_system(end: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(f'{{"prompt": "A\u2028B"}}{end}{{"prompt": "C"}}{end}'.encode())
    entries = read_list(tmp_path / "a.jsonl", "--prompts")
    assert [(entry.place, entry.prompt) for entry in entries] == [("a.jsonl:1", "A B"), ("a.jsonl:2", "C")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(TABLE.encode(), mtime=0), "is compressed by gzip; unpack it first"),
        (b"PK\x03\x04" + bytes(40), "is a ZIP archive; unpack it first (an Excel workbook: save it as CSV)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
    ],
    ids=["gzip", "zip", "lfs", "html"],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_files_that_are_no_lists_are_named_for_what_they_are(
    content: bytes, says: str, suffix: str, tmp_path: Path
) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        read_list(tmp_path / f"a.{suffix}", "--prompts")
    (violation,) = caught.value.violations
    assert says in violation.description


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "NULL", "N/A", "<NA>"])
def test_texts_of_a_missing_value_are_no_prompts(text: str) -> None:
    assert caption_fault(text) == (
        "",
        f"has no prompt: {text!r} is what programs write for a missing value",
    )
    assert caption_fault(f"{text} of a dog")[1] is None


def test_a_row_may_have_several_captions(tmp_path: Path) -> None:
    (tmp_path / "clotho.csv").write_text("file_name,caption_1,caption_2,caption_3,keywords\nx.wav,A,B,,dog\n")
    lists = {"num_captions_per_audio": 2, "data": [{"audio": "x.wav", "caption": ["A", None, "B"], "k": 1}]}
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    for name, fields in (("clotho.csv", {"keywords": "dog"}), ("lists.json", {"k": 1})):
        entries = read_list(tmp_path / name, "--prompts")
        assert captions(entries) == [("A", "x.wav"), ("B", "x.wav")]
        assert [entry.caption for entry in entries] == [1, 2]
        assert [entry.fields for entry in entries] == [fields, fields]


def test_null_fields_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": null, "caption": "A", "seed": null, "audio": null}\n')
    (entry,) = read_list(tmp_path / "a.jsonl", "--prompts")
    assert (entry.prompt, entry.location, entry.fields) == ("A", None, {})


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('caption,location\n"A dog barks, a.wav\nRain,b.wav\nBirds,c.wav\n', "a.csv:2"),
        ('caption,location\nRain,b.wav\n"A dog barks, a.wav\n"Birds",c.wav\n', "a.csv:3"),
        ('caption,location\n"A dog\nbarks","a.wav\nRain,b.wav\n', "a.csv:3"),
        ('caption,location\nRain,b.wav\n"A dog \\"barks\\"",a.wav\n', "a.csv:3"),
        ('caption;location\nRain;b.wav\n"A dog; a.wav\n', "a.csv:3"),
        ('caption,location\n"' + "long " * 40_000 + ",a.wav\n", "a.csv:2"),
    ],
)
def test_a_quote_that_never_closes_is_named_by_its_line(content: str, place: str, tmp_path: Path) -> None:
    assert "quote that is not closed" in faults(tmp_path / "a.csv", content)[place]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "caption,id\nA dog, barks,1\nRain\n,\n", {"a.csv:2": "3 cells", "a.csv:3": "1 cells"}),
        ("a.csv", "caption,caption\nA,B\n", {"a.csv:1": "'caption' twice"}),
        (
            "a.jsonl",
            '{"caption": "A"}\n{"caption": "A", "caption": "B"}\n',
            {"a.jsonl:2": "the field 'caption' twice"},
        ),
        ("a.json", '[{"caption": "A", "caption": "B"}]', {"a.json:1": "the field 'caption' twice"}),
        ("a.json", '{"data":\n[{"id": 1, "id": 2}]}', {"a.json:1": "the field 'id' twice"}),
        ("a.csv", "caption,id\n\n,3\n", {"a.csv:3": "has no prompt"}),
        ("a.csv", "sound,id\na,b\n", {"--prompts": "caption, text, prompt_text or target; it has sound, id"}),
        ("a.txt", "A dog barks\nRain\n", {"--prompts": "it has A dog barks"}),
        ("a.csv", "caption\nA dog\nB\xe4r\n".encode("latin-1"), {"a.csv:3": "no UTF-8"}),
        ("a.csv", "", {"--prompts": "holds no prompts"}),
        ("a.csv", "caption\n", {"--prompts": "holds no prompts"}),
        ("a.json", "[]", {"--prompts": "holds no prompts"}),
        ("a.json", '[\n{"prompt": "A"},\n{"prompt": \n]', {"a.json:4": "no JSON"}),
        ("a.json", '[\n{"prompt": "A"},\n{"id": 3}\n]', {"a.json:3": "has no prompt"}),
        ("a.json", '[{"prompt": "A"}, "B"]', {"a.json:1, row 1": "must be an object"}),
        ("a.json", "[" * 100_000, {"a.json:1": "no JSON"}),
        (
            "a.jsonl",
            '{"prompt": "A"}\n{"prompt": "B"\n{"prompt": 3}\n\n[1]\n{"prompt": " "}\n{"prompt": "A\\u0000"}\n'
            + json.dumps({"prompt": "x" * 1_001}),
            {
                "a.jsonl:2": "no JSON: Expecting ',' delimiter at column 15",
                "a.jsonl:3": "prompt is 3, must be str",
                "a.jsonl:5": "must be an object",
                "a.jsonl:6": "prompt is empty",
                "a.jsonl:7": "U+0000",
                "…": "and 1 more",
            },
        ),
        ("a.jsonl", '{"prompt": "A", "location": 3}', {"a.jsonl:1": "location is '3', must be str"}),
    ],
)  # fmt: skip
def test_invalid_rows_are_named_by_their_lines(
    name: str, content: str | bytes, expected: dict[str, str], tmp_path: Path
) -> None:
    found = faults(tmp_path / name, content)
    assert found.keys() == expected.keys()
    for place, says in expected.items():
        assert says in found[place]


def test_rows_without_a_clip_are_refused_where_one_is_needed(tmp_path: Path) -> None:
    content = "caption,location\nA,a.wav\nB,\n"
    found = faults(tmp_path / "a.csv", content, clip="needed")
    assert found == {"a.csv:3": "has no location; it has caption, location"}
    assert "has no column audio," in faults(tmp_path / "b.csv", "caption\nA\n", clip="needed")["--prompts"]
    assert captions(read_list(tmp_path / "a.csv", "x", prompts=("caption",))) == [("A", "a.wav"), ("B", None)]


def test_unusable_captions_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "A"}\n{"prompt": ""}\n{"text": 3}\n{"x": 1}\n')
    entries = read_list(tmp_path / "a.jsonl", "--prompts", keep_unusable=True)
    assert [entry.fault is None for entry in entries] == [True, False, False, False]


@pytest.mark.parametrize("values", [[b"A"], [3], [None], [1.5]], ids=str)
def test_a_parquet_column_that_is_no_text_is_refused_with_its_type(values: list[Any], tmp_path: Path) -> None:
    column = pa.array(values)
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    with pytest.raises(
        InvalidInputError, match=rf"--prompts: the column prompt of .* is {column.type}, must"
    ):
        read_list(tmp_path / "a.parquet", "--prompts", keep_unusable=True)


def test_parquet_that_embeds_its_clips_is_refused_where_clips_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["A"], "audio": [{"bytes": b"x"}]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match=r"column audio of .* embeds its clips"):
        read_list(tmp_path / "a.parquet", "--prompts", clip="needed")
    assert captions(read_list(tmp_path / "a.parquet", "--prompts", clip="ignored")) == [("A", None)]


@pytest.mark.parametrize(
    "text", ["zoo\\a.wav", "D:\\data\\zoo\\a.wav", "D:/data/zoo/a.wav", "\\\\host\\x\\zoo\\a.wav"]
)
def test_windows_paths_are_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "a.wav").touch()
    assert find_audio(text, tmp_path) == tmp_path / "zoo" / "a.wav"


def test_names_that_no_file_can_have_are_no_failure(tmp_path: Path) -> None:
    (tmp_path / "a\\b.wav").touch()
    assert find_audio("a\\b.wav", tmp_path) == tmp_path / "a\\b.wav"
    for text in ("x" * 5_000, "a\0b"):
        assert find_audio(text, tmp_path).name == text
