"""`milonga caption`: real files, real (tiny) models, real services."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services import cli
from services.cli.caption import MAX_BATCH
from services.processes import free_port
from tests.services.captioning.serving import Served, serving, write_models
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as serving_scoring
from tests.tiny import tiny_captioner, tiny_clap

RATE = 16_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of tiny models."""
    captioner, clap = write_models(tmp_path_factory.mktemp("models"))
    return ["--model", f"file:{captioner}", "--clap", f"file:{clap}"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(tiny_captioner(), tiny_clap()) as served:
        yield served


def write(path: Path, hertz: float = 440.0, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * RATE)) / RATE
    soundfile.write(path, 0.4 * np.sin(2 * np.pi * hertz * times), RATE)


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files in the working directory."""
    monkeypatch.chdir(tmp_path)
    names = ["tone [1].wav", "other.flac"]
    for index, name in enumerate(names):
        write(Path(name), 300.0 * (index + 1))
    return names


@pytest.fixture
def faulty(clips: list[str]) -> dict[str, str]:
    """Files that no captioner can describe, with a part of the reason."""
    soundfile.write("silence.wav", np.zeros(RATE), RATE)
    write(Path("short.wav"), seconds=0.05)
    write(Path("long.wav"), seconds=60.0)
    noise = np.random.default_rng(7).uniform(-0.5, 0.5, (RATE, 6))
    soundfile.write("six.wav", noise, RATE)
    soundfile.write("nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    Path("text.wav").write_text("a dog barks, he said\n" * 10)
    Path("folder.wav").mkdir()
    return {
        "silence.wav": "is silent",
        "short.wav": "send a longer one",
        "long.wav": "cut it",
        "six.wav": "mix it down",
        "nan.wav": "NaN",
        "text.wav": "begins with",
        "folder.wav": "is no file",
        "nowhere.wav": "No such file",
    }


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[list[str]], list[str]]:
    """Exit code, rows of cells on stdout, and lines on stderr of `milonga caption`."""
    code = cli.run(["caption", *arguments])
    out, err = capsys.readouterr()
    return code, [line.split("\t") for line in out.splitlines()], err.splitlines()


def test_a_sentence_for_each_clip(
    models: list[str], served: Served, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, here, _ = run(capsys, *clips, *models)
    assert code == 0
    assert here[0] == ["clip", "caption"]
    assert [row[0] for row in here[1:]] == clips
    assert run(capsys, *clips, "--server", served.target) == (0, here, [])


def test_candidates_are_shown_with_the_chosen_one_marked(
    models: list[str], clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, (header, *rows), _ = run(capsys, *clips, *models, "--candidates")
    assert (code, header) == (0, ["clip", "", "beams", "clap", "log prob", "caption"])
    assert [row[:2] for row in rows] == [[clips[0], "*"], [clips[0], ""], [clips[1], "*"], [clips[1], ""]]
    for best, other in (rows[:2], rows[2:]):
        assert float(best[3]) >= float(other[3])
        assert {best[2], other[2]} == {"2", "3"}
    _, (_, *captions), _ = run(capsys, *clips, *models)
    assert [row[1] for row in captions] == [rows[0][5], rows[2][5]]
    _, (_, plain), _ = run(capsys, clips[0], *models[:2], "--no-refine", "--candidates", "--beams", "3")
    assert plain[1:4] == ["*", "3", "-"]


def test_json_has_models_scorer_and_candidates(
    models: list[str], clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["caption", *clips, *models, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["location"] for one in records] == clips
    for one in records:
        assert one["caption"] == one["candidates"][0]["text"]
        assert one["candidates"][0].keys() == {"text", "beams", "log_probability", "clap_score"}
        assert (one["model"]["name"], one["scorer"]["model"]["name"]) == ("tiny-captioner", "tiny-clap")


def test_a_scoring_service_chooses(
    models: list[str], clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving_scoring({"a": f"file:{save_tiny_clap(tmp_path / 'a', 0)}"}) as scoring:
        remote = run(capsys, *clips, *models[:2], "--scoring", scoring.hosted.target, "--candidates")
    near = run(capsys, *clips, *models, "--candidates")
    assert [row[5] for row in remote[1]] == [row[5] for row in near[1]]


@pytest.mark.parametrize("where", ["here", "service"])
def test_bad_clips_are_listed_at_the_end_and_the_others_described(
    models: list[str],
    served: Served,
    clips: list[str],
    faulty: dict[str, str],
    where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = models if where == "here" else ["--server", served.target]
    code, rows, err = run(capsys, clips[0], *faulty, clips[1], *place)
    assert code == 2
    assert [row[0] for row in rows[1:]] == clips
    *lines, last = err
    found = dict(line.split(": ", 1) for line in lines)
    assert found.keys() == faulty.keys()
    for name, reason in faulty.items():
        assert reason in found[name], name
    assert last == f"error: CLIP: {len(faulty)} of {len(faulty) + 2} clips were refused"


# Folders


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """More clips than fit into a call, in folders, and files of other kinds."""
    monkeypatch.chdir(tmp_path)
    for index in range(MAX_BATCH + 2):
        write(Path(f"recordings/{index % 3}/clip {index}.wav"), 200.0 + 20 * index, 0.2)
    Path("recordings/readme.txt").write_text("no clip")
    return tmp_path / "recordings"


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_becomes_a_list_that_training_reads(
    models: list[str], recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows, err = run(capsys, "--folder", "recordings", "-o", "captions.jsonl", *models, "--no-refine")
    assert code == 2, "--clap and --no-refine"
    code, rows, err = run(capsys, "--folder", "recordings", "-o", "captions.jsonl", *models)
    assert (code, rows) == (0, [["captions.jsonl"]])
    assert err == [f"{MAX_BATCH + 2} described, 0 there already, 0 refused"]
    found = lines_of(Path("captions.jsonl"))
    assert all(one.keys() == {"key", "source", "target"} for one in found)
    keys = [one["key"] for one in found]
    assert keys == sorted(path.relative_to(recordings).as_posix() for path in recordings.rglob("*.wav"))
    assert [one["source"] for one in found] == [f"recordings/{key}" for key in keys]
    # In a table on stdout without a list.
    _, (_, *table), _ = run(capsys, "--folder", "recordings", *models)
    assert [row[1] for row in table] == [one["target"] for one in found]


def test_a_run_is_continued_and_not_repeated(
    models: list[str], recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--folder", "recordings", "-o", "out.jsonl", *models]
    run(capsys, *arguments)
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    # Killed while it wrote the sixth line.
    Path("out.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (0, [f"{MAX_BATCH - 3} described, 5 there already, 0 refused"])
    assert Path("out.jsonl").read_bytes() == whole
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (0, [f"0 described, {MAX_BATCH + 2} there already, 0 refused"])
    assert Path("out.jsonl").read_bytes() == whole


def test_clips_outside_of_the_lists_folder_have_absolute_paths(
    models: list[str], recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lists").mkdir()
    code, _, _ = run(capsys, "--folder", "recordings/0", "-o", "lists/out.jsonl", *models)
    assert code == 0
    assert all(Path(one["source"]).is_absolute() for one in lines_of(Path("lists/out.jsonl")))


def test_one_bad_file_does_not_lose_the_others(
    models: list[str], recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recordings / "1" / "bad.wav").write_text("no sound")
    (recordings / "2" / "film.m4a").write_bytes(b"\x00\x00\x00\x20ftypM4A " + bytes(64))
    arguments = ["--folder", "recordings", "-o", "out.jsonl", *models]
    for described in (MAX_BATCH + 2, 0):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert [line.partition(":")[0] for line in err[:2]] == ["1/bad.wav", "2/film.m4a"]
        assert err[2].startswith(f"{described} described, ")
        assert len(lines_of(Path("out.jsonl"))) == MAX_BATCH + 2


def test_a_service_that_goes_leaves_what_was_written(
    models: list[str], recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = f"127.0.0.1:{free_port()}"
    arguments = ["--folder", "recordings", "-o", "out.jsonl"]
    run(capsys, "--folder", "recordings/0", "-o", "out.jsonl", *models)
    before = Path("out.jsonl").read_bytes()
    code, _, err = run(capsys, *arguments, "--server", absent, "--timeout", "3")
    assert code == 3
    assert err[-1].startswith(f"error: {absent}: ")
    assert Path("out.jsonl").read_bytes() == before


# Refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "CLIP: give audio files"),
        (["a.wav", "--folder", "."], "CLIP: give audio files"),
        (["--folder", "nowhere"], "--folder: nowhere is no folder"),
        (["--folder", "."], "--folder: . has no audio files"),
        (["a.wav", "--server", "localhost"], "--server: is 'localhost', which has no port"),
        (["a.wav", "--server", "x:1", "--clap", "mini:clap-a"], "--model, --clap, --scoring"),
        (["a.wav", "--clap", "mini:clap-a", "--scoring", "x:1"], "--clap, --scoring"),
        (["a.wav", "--no-refine", "--scoring", "x:1"], "--no-refine"),
        (["a.wav", "--timeout", "3"], "--timeout: is for calls to a service"),
        (["a.wav", "--model", "nonsense"], "--model: is 'nonsense'"),
        (["a.wav", "-o", "nowhere/out.jsonl"], "nowhere does not exist"),
        (["a.wav", "-o", "other.jsonl"], "--output: other.jsonl:2 is no line of captions"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "a.wav" in arguments and "--folder" not in arguments:
        write(Path("a.wav"))
    Path("other.jsonl").write_text('{"key": "a", "source": "a", "target": "b"}\n{"prompt": "x"}\n')
    code, rows, err = run(capsys, *arguments)
    assert (code in (2, 4), rows, len(err)) == (True, [], 1)
    assert err[0].startswith(f"error: {says}")


@pytest.mark.parametrize("options", [["--beams", "17"], ["--max-new-tokens", "1000"]])
def test_wrong_options_are_no_fault_of_the_clips(
    models: list[str], clips: list[str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows, err = run(capsys, *clips, *models, *options)
    assert (code, rows) == (2, [])
    assert err == [err[0]]
    assert err[0].startswith(f"error: {options[0]}: is {options[1]}, must be between 1 and ")


def test_names_that_are_not_utf8_are_continued_too(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    write(clips / "cafe.wav")
    (clips / "cafe.wav").rename(clips / os.fsdecode(b"caf\xe9.wav"))
    arguments = ["--folder", str(clips), "-o", str(tmp_path / "out.jsonl"), *models]
    assert run(capsys, *arguments)[2] == ["1 described, 0 there already, 0 refused"]
    assert run(capsys, *arguments)[2] == ["0 described, 1 there already, 0 refused"]
    (line,) = lines_of(tmp_path / "out.jsonl")
    assert os.fsencode(line["source"]) == b"clips/caf\xe9.wav"


def test_candidates_are_shown_next_to_a_list(
    models: list[str], clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows, _ = run(capsys, *clips, *models, "--candidates", "-o", "out.jsonl")
    assert (code, len(rows)) == (0, 1 + 4 + 1)
    assert rows[-1] == ["out.jsonl"]
