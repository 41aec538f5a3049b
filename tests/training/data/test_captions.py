import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services.errors import InvalidInputError
from training.data.captions import CaptionExample, read_examples
from training.data.examples import FileClip


def write_clip(path: Path, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(16_000 * seconds), 0.1, dtype=np.float32), 16_000)
    return path


def pairs_of(examples: list[CaptionExample]) -> list[tuple[str, str]]:
    found = []
    for example in examples:
        assert isinstance(example.clip, FileClip)
        found.append((example.clip.path.name, example.caption))
    return found


def test_lines_of_slam_aac_are_read(tmp_path: Path) -> None:
    write_clip(tmp_path / "waveforms" / "Y1.wav")
    rows = [
        {"key": "Y1_1", "source": "/root/data/AudioCaps/waveforms/Y1.wav", "target": "A dog  barks"},
        {"key": "Y1_2", "source": "waveforms/Y1.wav", "target": "Barking"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(tmp_path / "train.jsonl")
    assert pairs_of(examples) == [("Y1.wav", "A dog barks"), ("Y1.wav", "Barking")]
    assert all(isinstance(e.clip, FileClip) and e.clip.path.exists() for e in examples)
    assert examples[0].clip == examples[1].clip


def test_clotho_has_five_captions_for_a_clip(tmp_path: Path) -> None:
    header = "file_name," + ",".join(f"caption_{n}" for n in range(1, 6))
    (tmp_path / "clotho.csv").write_text(f'{header}\nRain.wav,one,two,"three, or so",four,five\n')
    assert pairs_of(read_examples(tmp_path / "clotho.csv")) == [
        ("Rain.wav", caption) for caption in ("one", "two", "three, or so", "four", "five")
    ]


@pytest.mark.parametrize("name", ["Yabc.wav", "abc.flac", "abc_30.wav", "abc_30000.wav", "91139.wav"])
def test_clips_of_audiocaps_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "audiocaps.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n91139,abc,30,A dog barks\n"
    )
    write_clip(tmp_path / "clips" / name)
    (example,) = read_examples(tmp_path / "audiocaps.csv", tmp_path / "clips")
    assert isinstance(example.clip, FileClip)
    assert example.clip.path == tmp_path / "clips" / name


def test_a_list_without_clips_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("caption\nA dog barks\n")
    with pytest.raises(InvalidInputError, match=r"list\.csv:2: names no clip"):
        read_examples(tmp_path / "list.csv")


def test_a_folder_has_text_next_to_its_clips_or_one_list(tmp_path: Path) -> None:
    for name in ("b.wav", "sub/a.wav"):
        write_clip(tmp_path / name)
    (tmp_path / "b.txt").write_text("A bell rings\n\nA bell tolls\n")
    with pytest.raises(
        InvalidInputError, match=r"1 of 2 clips .* \(a\.wav\); write them, or `milonga caption"
    ):
        read_examples(tmp_path)
    (tmp_path / "sub" / "a.txt").write_text("A cat meows")
    assert pairs_of(read_examples(tmp_path)) == [
        ("b.wav", "A bell rings"),
        ("b.wav", "A bell tolls"),
        ("a.wav", "A cat meows"),
    ]
    (tmp_path / "captions.jsonl").write_text('{"source": "b.wav", "target": "From the list"}\n')
    assert pairs_of(read_examples(tmp_path)) == [("b.wav", "From the list")]
    (tmp_path / "more.csv").write_text("file_name,caption\nb.wav,x\n")
    with pytest.raises(
        InvalidInputError, match=r"2 lists \(captions\.jsonl, more\.csv\); give the path of one"
    ):
        read_examples(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="has no clips"):
        read_examples(tmp_path / "empty")


def test_unusable_captions_are_refused_or_collected_with_their_place(tmp_path: Path) -> None:
    rows = [{"source": "a.wav", "target": "A dog barks"}, {"source": "b.wav", "target": " "}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidInputError, match=r"list\.jsonl:2"):
        read_examples(tmp_path / "list.jsonl")
    unusable: dict[str, str] = {}
    assert len(read_examples(tmp_path / "list.jsonl", unusable=unusable)) == 1
    assert list(unusable) == ["list.jsonl:2"]
