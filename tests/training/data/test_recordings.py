"""Data sets as people have them: every layout gives the same recordings."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import soundfile

from services.errors import InvalidInputError
from services.lists import class_captions
from training.data.examples import FileClip, ParquetClip
from training.data.recordings import list_files, read_recordings


def write_clip(path: Path, level: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(1_600, level, dtype=np.float32), 16_000)
    return path


def encoded(level: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(1_600, level, dtype=np.float32), 16_000, format="FLAC")
    return file.getvalue()


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("dog_bark/a.wav", "dog_bark/more/b.flac", "rain/c.ogg", ".git/d.wav", "rain/._c.ogg"):
        write_clip(tmp_path / name)
    found = read_recordings(tmp_path)
    assert [(Path(one.clip.name).name, one.sound, one.captions) for one in found] == [
        ("a.wav", "dog_bark", class_captions("dog_bark")),
        ("b.flac", "dog_bark", class_captions("dog_bark")),
        ("c.ogg", "rain", class_captions("rain")),
    ]
    (tmp_path / "captions.json").write_text('{"dog bark": "A dog barks"}')
    assert read_recordings(tmp_path)[0].captions == ("A dog barks",)
    assert list_files(tmp_path) == [tmp_path / "captions.json"]
    (tmp_path / "captions.json").write_text('{"dgo": "A dog barks"}')
    with pytest.raises(
        InvalidInputError, match=r"captions\.json: names the class 'dgo', of which there is no"
    ):
        read_recordings(tmp_path)


def test_folders_of_folds_hold_those_of_classes(tmp_path: Path) -> None:
    for name in ("train/dog/a.wav", "train/rain/b.wav", "test/dog/c.wav"):
        write_clip(tmp_path / name)
    assert [(one.sound, one.fold) for one in read_recordings(tmp_path)] == [
        ("dog", "test"),
        ("dog", "train"),
        ("rain", "train"),
    ]


def test_a_clip_outside_the_folders_of_classes_is_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "dog" / "a.wav")
    with pytest.raises(InvalidInputError, match="give the folder above if dog is a class"):
        read_recordings(tmp_path / "dog")
    write_clip(tmp_path / "loose {0}.wav")
    with pytest.raises(InvalidInputError, match=r"1 of 2 clips .* have no caption: .*\(loose \{0\}\.wav\)"):
        read_recordings(tmp_path)


def test_a_folder_of_other_files_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.m4a").write_bytes(b"x")
    with pytest.raises(
        InvalidInputError, match=r"has no clips .*it has 1 \.m4a; convert them, e\.g\. `ffmpeg"
    ):
        read_recordings(tmp_path)


def test_rows_of_a_clip_are_one_recording(tmp_path: Path) -> None:
    rows = [
        {"audio": "a.wav", "caption": "A dog barks", "youtube_id": "abc", "split": "train", "licence": "CC0"},
        {"audio": "a.wav", "caption": "A hound", "youtube_id": "abc"},
        {"audio": "b.wav", "caption": None, "youtube_id": "abc"},
        {"audio": "b.wav", "caption": "Rain", "youtube_id": "abc"},
        {"audio": "c.wav", "caption": None, "youtube_id": 7, "split": "test"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unusable: dict[str, str] = {}
    a, b, c = read_recordings(tmp_path, unusable=unusable)
    assert (a.captions, a.places) == (("A dog barks", "A hound"), ("list.jsonl:1", "list.jsonl:2"))
    assert (a.source, a.fold, a.fields["licence"]) == ("abc", "train", "CC0")
    assert (b.captions, b.places, c.captions) == (("Rain",), ("list.jsonl:4",), ())
    assert (c.source, c.fold) == ("7", "test")
    assert list(unusable) == ["list.jsonl:3", "list.jsonl:5"]
    with pytest.raises(InvalidInputError, match=r"list\.jsonl:3: has no prompt"):
        read_recordings(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "recording"),
    [
        ("list.csv", "location,source,captions\na.wav,field 7,A dog barks\n", "field 7"),
        ("list.json", '{"data": [{"id": "a.flac", "caption": "A dog barks", "freesound_id": 7}]}', "7"),
        ("list.csv", "youtube_id,start_time,caption\na,30,A dog barks\n", "a"),
        ("list.csv", 'file_name,caption_1,caption_2\n"a.wav",A dog barks,\n', None),
    ],
    ids=["tango", "wavcaps", "audiocaps", "clotho"],
)
def test_lists_of_known_data_sets(name: str, content: str, recording: str | None, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.wav")
    (tmp_path / name).write_text(content)
    (found,) = read_recordings(tmp_path / name)
    assert (found.clip, found.captions, found.source) == (FileClip(path=clip), ("A dog barks",), recording)


@pytest.mark.parametrize("column", ["audio", "chosen"])
def test_parquet_may_embed_its_clips(column: str, tmp_path: Path) -> None:
    texts = "prompt" if column == "chosen" else "caption"
    table = pa.table(
        {
            texts: ["A dog barks", "Rain falls", "A bell tolls"],
            column: [{"bytes": encoded(0.1 * n), "path": f"{n}.flac"} for n in (1, 2, 3)],
            "rejected": [{"bytes": encoded(0.5), "path": None}] * 3,
            "fold": [1, 1, 2],
        }
    )
    pq.write_table(table, tmp_path / "set.parquet", row_group_size=2)
    found = read_recordings(tmp_path / "set.parquet")
    assert [(one.captions[0], one.fold) for one in found] == [
        ("A dog barks", "1"),
        ("Rain falls", "1"),
        ("A bell tolls", "2"),
    ]
    for number, one in enumerate(found, start=1):
        assert isinstance(one.clip, ParquetClip)
        assert one.clip.read()[0].max() == pytest.approx(0.1 * number, abs=1e-4)


def test_a_text_file_may_be_empty(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.wav")
    (tmp_path / "a.txt").write_text("A dog barks\n")
    (tmp_path / "b.txt").write_text("\n")
    unusable: dict[str, str] = {}
    assert [one.captions for one in read_recordings(tmp_path, unusable=unusable)] == [("A dog barks",), ()]
    assert list(unusable) == ["b.txt:1"]
