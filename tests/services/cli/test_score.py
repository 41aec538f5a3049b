"""`milonga score`, and `milonga generate --candidates`: real files, real (tiny) judges, real services."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import soundfile

from services import cli, client
from services.cli import score as score_command
from services.cli.audio_files import batches
from services.cli.score import Pair, read_pair_file
from services.errors import InvalidInputError
from services.lists import class_captions
from services.models.clap.loading import load_clap
from services.models.manifest import read_manifest, write_manifest
from services.models.reward.model import load_reward
from services.processes import free_port
from tests.programs import Services
from tests.services.audio.sounds import antiphase
from tests.services.client.serving import Told, serving
from tests.tiny import tiny_clap, tiny_pipeline, tiny_reward

PROMPT = "a dog barks then a siren wails"
QUICK = ("--steps", "2", "--duration", "0.64")
RATE = 16_000
EMBEDDED = (
    *("--scorer", "clap-a=mini:clap-a", "--scorer", "clap-b=mini:clap-b"),
    *("--reward", "mini", "--clap", "mini:clap-a"),
)
"""The judges of the session's services, for this process."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Folders of tiny models."""

    sound: Path
    clap_a: Path
    clap_b: Path
    reward: Path

    @property
    def scorers(self) -> list[str]:
        return ["--scorer", f"a=file:{self.clap_a}", "--scorer", f"b=file:{self.clap_b}"]

    @property
    def rewards(self) -> list[str]:
        return ["--reward", f"file:{self.reward}", "--clap", f"file:{self.clap_a}"]

    @property
    def judges(self) -> list[str]:
        return [*self.scorers, *self.rewards]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    found = Models(
        sound=root / "sound", clap_a=root / "clap-a", clap_b=root / "clap-b", reward=root / "reward"
    )
    clap = tiny_clap(0)
    tiny_pipeline().save_pretrained(found.sound)
    clap.save(found.clap_a)
    tiny_clap(1).save(found.clap_b)
    for folder in (found.sound, found.clap_a, found.clap_b):
        write_manifest(folder, name=f"tiny-{folder.name}", version="1", license="Apache-2.0")
    tiny_reward(clap, read_manifest(found.clap_a).digest).save(found.reward)
    write_manifest(found.reward, name="tiny-reward", version="2", license="Apache-2.0")
    return found


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files of sound in the working directory: two rates, mono and stereo, WAV and FLAC."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(7)
    soundfile.write("tone [1].wav", 0.3 * np.sin(np.arange(RATE) * 0.2), RATE)
    soundfile.write("noise.flac", generator.uniform(-0.5, 0.5, (66_150, 2)), 44_100)
    return ["tone [1].wav", "noise.flac"]


def rows_of(text: str) -> tuple[list[str], dict[str, list[float]]]:
    """Header, and numbers by the first cell, of tab-separated lines."""
    header, *rows = (line.split("\t") for line in text.splitlines())
    return header, {row[0]: [float(cell) for cell in row[1:]] for row in rows}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return str(err)


# Scoring, in this process


def test_a_row_for_each_clip_and_a_column_for_each_judge(
    models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["score", PROMPT, *clips, *models.judges]) == 0
    header, rows = rows_of(capsys.readouterr().out)
    assert header == ["clip", "a", "b", "reward", "probability"]
    assert list(rows) == clips

    claps = [load_clap(folder) for folder in (models.clap_a, models.clap_b)]
    reward = load_reward(models.reward, claps[0], read_manifest(models.clap_a).digest)
    for name, values in rows.items():
        waveform, rate = soundfile.read(name, dtype="float32", always_2d=True)
        expected = [float(clap.score([PROMPT], [waveform.T], rate)) for clap in claps]
        logit = float(reward.reward([PROMPT], [reward.prepare(waveform.mean(1), rate)]))
        assert values == pytest.approx([*expected, logit, 1 / (1 + np.exp(-logit))], abs=2e-6)


def test_json_names_the_weights(models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["score", PROMPT, *clips, *models.judges, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(record["location"], record["prompt"]) for record in records] == [(one, PROMPT) for one in clips]
    for record in records:
        assert list(record["scores"]) == ["a", "b"]
        assert -1 <= record["scores"]["b"]["score"] <= 1
        assert record["scores"]["b"]["model"]["digest"] == read_manifest(models.clap_b).digest
        assert record["reward"]["model"]["name"] == "tiny-reward"
        assert record["reward"]["model"]["version"] == "2"
        assert 0 < record["reward"]["probability"] < 1


def test_warnings_name_the_clip(
    models: Models, clips: list[str], capsys: pytest.CaptureFixture[str], services: Services
) -> None:
    soundfile.write("odd.wav", antiphase(), RATE)
    served = ["--scoring", services.scoring, "--reward-server", services.reward]
    for where in (models.judges, served):
        assert cli.run(["score", PROMPT, *clips, "odd.wav", *where, "--json"]) == 0
        out, err = capsys.readouterr()
        (warning,) = err.splitlines()
        assert warning.startswith("warning: odd.wav: clip has channels that cancel each other")
        told = [json.loads(line).get("warnings", []) for line in out.splitlines()]
        assert told == [[], [], [warning.removeprefix("warning: odd.wav: ")]]


def test_warnings_on_the_only_prompt_come_once(
    models: Models, clips: list[str], capsys: pytest.CaptureFixture[str], services: Services
) -> None:
    served = ["--scoring", services.scoring, "--reward-server", services.reward]
    for where in (models.judges, served):
        assert cli.run(["score", "a zebra", *clips, *where, "--json"]) == 0
        out, err = capsys.readouterr()
        (warning,) = err.splitlines()
        lost = "zebra, and none for a sound that it knows; use other words"
        assert warning == f"warning: prompt has words that the model does not know: {lost}"
        for line in out.splitlines():
            assert json.loads(line)["warnings"] == [warning.removeprefix("warning: ")]


def test_a_person_gets_an_aligned_table(
    models: Models,
    clips: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_command, "is_terminal", lambda: True)
    assert cli.run(["score", PROMPT, *clips, *models.judges]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["clip", "a", "b", "reward", "probability"]
    assert len(rows) == 2
    assert rows[0].startswith("tone [1].wav ")
    assert all(len(row) == len(rows[0]) and "\t" not in row for row in rows)


def test_names_of_files_may_be_any_bytes(
    models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"\xff\t.wav")
    Path(name).write_bytes(Path(clips[0]).read_bytes())
    assert cli.run(["score", PROMPT, name, *models.scorers, "--no-reward"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("\t") == ["clip", "a", "b"]
    assert len(row.split("\t")) == 3
    assert row.startswith("\ufffd .wav\t")


def test_judges_are_chosen(models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["score", PROMPT, *clips, *models.scorers[:2], "--no-reward"]) == 0
    header, rows = rows_of(capsys.readouterr().out)
    assert header == ["clip", "a"]
    assert all(len(values) == 1 for values in rows.values())


def test_pairs_from_a_file(models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("data")
    folder.mkdir()
    lines: list[dict[str, Any]] = [
        {"prompt": PROMPT, "location": f"../{clips[0]}"},
        {"captions": "a bell rings", "location": str(Path(clips[1]).resolve()), "seed": 7, "model": {}},
    ]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    assert cli.run(["score", "--prompts", "data/index.jsonl", *models.judges]) == 0
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header == ["clip", "a", "b", "reward", "probability", "prompt"]
    assert [(row[0], row[-1]) for row in rows] == [
        (line["location"], line.get("prompt", "a bell rings")) for line in lines
    ]
    for row, clip in zip(rows, clips, strict=True):
        assert cli.run(["score", row[-1], clip, *models.judges]) == 0
        _, alone = rows_of(capsys.readouterr().out)
        assert [float(cell) for cell in row[1:-1]] == pytest.approx(alone[clip], abs=2e-6)


def test_more_clips_than_a_call_takes(
    models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{number}.wav" for number in range(18)]
    for number, name in enumerate(names):
        soundfile.write(name, 0.3 * np.sin(np.arange(1_600 * (number + 1)) * 0.1), RATE)
    assert cli.run(["score", PROMPT, *names, *models.judges]) == 0
    _, rows = rows_of(capsys.readouterr().out)
    assert list(rows) == names
    assert cli.run(["score", PROMPT, names[17], *models.judges]) == 0
    _, alone = rows_of(capsys.readouterr().out)
    assert rows[names[17]] == pytest.approx(alone[names[17]], abs=2e-6)


def test_calls_are_bounded_in_clips_and_bytes() -> None:
    def cut(*sizes: int) -> list[int]:
        pairs = [Pair(prompt="", path=Path(), location="", place="")] * len(sizes)
        return [len(batch) for batch in batches(pairs, sizes, 16)]

    mebibyte = 2**20
    assert cut(*[1] * 33) == [16, 16, 1]
    assert cut(100 * mebibyte, 20 * mebibyte, 20 * mebibyte) == [2, 1]
    assert cut(1, 500 * mebibyte, 1) == [1, 1, 1]


# Scoring, what is refused


def test_every_clip_and_the_prompt_are_told_before_any_work(
    clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.wav").write_text("no sound at all")
    Path("cut.wav").write_bytes(Path(clips[0]).read_bytes()[:1_000])
    Path("folder").mkdir()
    soundfile.write("short.wav", np.zeros(100), RATE)
    wrong = ["text.wav", "cut.wav", "folder", "short.wav", "missing.wav"]
    # The models are wrong, too: they are not even looked for.
    assert cli.run(["score", " ", *clips, *wrong, "--scorer", "a=file:nowhere", "--no-reward"]) == 2
    line = error_of(capsys)
    for name in ("PROMPT", *wrong):
        assert f"{name}: " in line
    for name in clips:
        assert name not in line


def test_wrong_lines_are_named_with_their_numbers(
    models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["{", "[]", "{}", '{"prompt": "x"}', '{"prompt": "x", "location": 3}']
    Path("p.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidInputError) as caught:
        read_pair_file(Path("p.jsonl"))
    assert [violation.field for violation in caught.value.violations] == [f"p.jsonl:{n}" for n in range(1, 6)]
    words = ("no JSON", "object", "no prompt", "no location", "location is '3', must be str")
    for violation, says in zip(caught.value.violations, words, strict=True):
        assert says in violation.description

    lines = [
        json.dumps({"prompt": "", "location": clips[0]}),
        json.dumps({"prompt": PROMPT, "location": "missing.wav"}),
        json.dumps({"prompt": PROMPT, "location": clips[1]}),
    ]
    Path("p.jsonl").write_text("\n".join(lines))
    assert cli.run(["score", "--prompts", "p.jsonl", *models.judges]) == 2
    line = error_of(capsys)
    assert "p.jsonl:1: prompt is empty" in line
    assert "p.jsonl:2: location missing.wav can't be read" in line
    assert "p.jsonl:3" not in line


def test_lists_of_clips_are_read_in_the_forms_that_data_sets_have(
    models: Models, clips: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("zoo").mkdir()
    Path("zoo/a.flac").write_bytes(Path(clips[1]).read_bytes())
    Path("windows.jsonl").write_text(json.dumps({"caption": PROMPT, "location": "zoo\\a.flac"}))
    Path("clotho.csv").write_text(f"file_name,caption_1,caption_2\na.flac,{PROMPT},Rain\n")
    Path("clotho.csv").rename("zoo/clotho.csv")
    content = f"caption\tlocation\n{PROMPT}\tzoo/a.flac\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    embedded = [{"bytes": Path(clips[1]).read_bytes(), "path": None}]
    pq.write_table(pa.table({"caption": [PROMPT], "audio": embedded}), "set.parquet")
    Path("zoo/Yabc.flac").write_bytes(Path(clips[1]).read_bytes())
    Path("zoo/audiocaps.csv").write_text(f"youtube_id,start_time,caption\nabc,30,{PROMPT}\n")
    Path("zoo/classes.csv").write_text("file,class\na.flac,dog_bark\n")
    first = []
    for name, prompts in (
        ("windows.jsonl", [PROMPT]), ("zoo/clotho.csv", [PROMPT, "Rain"]), ("-", [PROMPT]),
        ("set.parquet", [PROMPT]), ("zoo/audiocaps.csv", [PROMPT]),
        ("zoo/classes.csv", list(class_captions("dog_bark"))),
    ):  # fmt: skip
        assert cli.run(["score", "--prompts", name, "--json", *models.scorers, "--no-reward"]) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["prompt"] for record in records] == prompts
        if prompts[0] == PROMPT:
            first.append([one["score"] for one in records[0]["scores"].values()])
    for scores in first[1:]:
        assert scores == pytest.approx(first[0], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "PROMPT"),
        ([PROMPT], "CLIP"),
        ([PROMPT, "--prompts", "p.jsonl"], "PROMPT"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
        ([PROMPT, "CLIP", "--scorer", "nonsense"], "NAME=URI"),
        ([PROMPT, "CLIP", "--scorer", "a=x", "--scorer", "a=y"], "twice"),
        ([PROMPT, "CLIP", "--scorer", "a=nonsense", "--no-reward"], "--scorer a: is 'nonsense'"),
        ([PROMPT, "CLIP", "--reward", "mini:nobody"], "--reward: "),
        ([PROMPT, "CLIP", "--clap", "nonsense"], "--clap: "),
        ([PROMPT, "CLIP", "--clap", "laion-clap:x.pt"], "no tokens"),
        ([PROMPT, "CLIP", "--clap", "mini:clap-a", "--no-reward"], "--clap"),
        ([PROMPT, "CLIP", "--reward", "mini", "--no-reward"], "--no-reward"),
        ([PROMPT, "CLIP", "--reward", "mini", "--reward-server", "x:1"], "--reward-server"),
        ([PROMPT, "CLIP", "--scoring", ""], "--scoring"),
        ([PROMPT, "CLIP", "--scoring", "grpc://x:1"], "--scoring: is 'grpc://x:1', a URL; give x:1"),
        ([PROMPT, "CLIP", "--reward-server", "x"], "--reward-server: is 'x', which has no port;"),
        ([PROMPT, "CLIP", "--scoring", "x:1", "--scorer", "a=mini:clap-a"], "--scorer"),
        ([PROMPT, "CLIP", "--scoring", "x:1", "--device", "cpu"], "--device"),
        ([PROMPT, "CLIP", "--scoring", "x:1", "--timeout", "0"], "--timeout"),
        ([PROMPT, "CLIP", "--timeout", "5"], "--timeout"),
        ([PROMPT, "CLIP", "--tls"], "--tls"),
    ],
)
def test_wrong_flags_are_one_line_and_2(
    arguments: list[str], says: str, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [clips[0] if one == "CLIP" else one for one in arguments]
    assert cli.run(["score", *given]) == 2
    assert says in error_of(capsys)


def test_refused_models_are_named_by_their_flag(
    models: Models, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = ["--reward", f"file:{models.reward}", "--clap", f"file:{models.clap_b}"]
    assert cli.run(["score", PROMPT, *clips, *models.scorers, *rewards]) == 2
    assert "--reward: " in (line := error_of(capsys))
    assert read_manifest(models.clap_a).digest in line
    assert cli.run(["score", PROMPT, *clips, "--scorer", f"x=file:{models.sound}", "--no-reward"]) == 2
    assert "--scorer x: " in error_of(capsys)
    assert cli.run(["score", PROMPT, *clips, *models.judges, "--device", "nonsense"]) == 2
    assert "--device: " in error_of(capsys)


# Scoring, through services


def test_services_say_what_this_process_says(
    services: Services, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["score", PROMPT, *clips, *EMBEDDED]) == 0
    here = rows_of(capsys.readouterr().out)
    there = ["--scoring", services.scoring, "--reward-server", services.reward]
    assert cli.run(["score", PROMPT, *clips, *there]) == 0
    header, rows = rows_of(capsys.readouterr().out)
    assert header == here[0]
    for clip, values in rows.items():
        assert values == pytest.approx(here[1][clip], abs=1e-5)


def test_services_need_no_torch_here(services: Services, clips: list[str]) -> None:
    arguments = ["score", PROMPT, *clips, "--scoring", services.scoring, "--reward-server", services.reward]
    program = (
        f"import sys; from services.cli import run; code = run({arguments!r});"
        "heavy = {'torch', 'transformers', 'scipy', 'pydantic_settings'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


def test_some_scorers_of_a_service(
    models: Models, services: Services, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["score", PROMPT, *clips, "--scoring", services.scoring, "--scorer", "clap-b"]) == 0
    assert rows_of(capsys.readouterr().out)[0] == ["clip", "clap-b"]
    # One judge there, the other here.
    assert cli.run(["score", PROMPT, *clips, "--scoring", services.scoring, *models.rewards]) == 0
    assert rows_of(capsys.readouterr().out)[0] == ["clip", "clap-a", "clap-b", "reward", "probability"]
    assert cli.run(["score", PROMPT, *clips, "--scoring", services.scoring, "--scorer", "c"]) == 2
    assert "--scorer: is 'c', must be one of clap-a, clap-b" in error_of(capsys)


def test_a_service_that_is_not_there_is_3(clips: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    target = f"127.0.0.1:{free_port()}"
    assert cli.run(["score", PROMPT, *clips, "--reward-server", target]) == 3
    assert target in error_of(capsys)


# The best of several candidates


def generated(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run `milonga generate --json`; return its record."""
    assert cli.run(["generate", PROMPT, *QUICK, "--seed", "7", "--json", *arguments]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def test_the_best_candidates_are_kept(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", f"file:{models.sound}"]
    best = [*model, *models.rewards, "--candidates", "4", "-o", str(tmp_path / "best.wav")]
    record = generated([*best, "--clips", "2"], capsys)
    candidates = record["candidates"]
    assert sorted(one["clip_index"] for one in candidates) == [0, 1, 2, 3]
    assert [one["value"] for one in candidates] == sorted((one["value"] for one in candidates), reverse=True)
    assert [one["kept"] for one in candidates] == [True, True, False, False]
    assert [one["clip_index"] for one in record["clips"]] == [one["clip_index"] for one in candidates[:2]]
    assert record["judges"][0]["name"] == "tiny-reward"
    assert record["rank_by"] == "reward"

    # They are the clips of the same seed, and worth what `milonga score` says of them.
    every = generated([*model, "--clips", "4", "-o", str(tmp_path / "all.wav")], capsys)
    kept = [Path(clip["location"]).read_bytes() for clip in record["clips"]]
    made = [Path(clip["location"]).read_bytes() for clip in every["clips"]]
    assert kept == [made[one["clip_index"]] for one in candidates[:2]]
    names = [clip["location"] for clip in every["clips"]]
    assert cli.run(["score", PROMPT, *names, *models.judges]) == 0
    _, rows = rows_of(capsys.readouterr().out)
    for one in candidates:
        logit, probability = rows[names[one["clip_index"]]][2:]
        assert one["value"] == pytest.approx(logit, abs=2e-6)
        assert one["probability"] == pytest.approx(probability, abs=2e-6)


def test_clap_ranks_by_the_mean_of_its_scorers(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", f"file:{models.sound}", *models.scorers, "--candidates", "3", "--rank-by", "clap"]
    record = generated([*common, "-o", str(tmp_path / "c.wav")], capsys)
    for one in record["candidates"]:
        assert one["value"] == pytest.approx((one["scores"]["a"] + one["scores"]["b"]) / 2, abs=1e-6)
    assert [model["name"] for model in record["judges"]] == ["tiny-clap-a", "tiny-clap-b"]
    assert [path.name for path in tmp_path.iterdir()] == ["c.wav"]

    assert cli.run(["generate", PROMPT, *QUICK, *common, "-o", str(tmp_path / "c.wav"), "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "c.wav")]
    header, *rows = err.splitlines()
    assert header.split() == ["candidate", "seed", "mean", "CLAP", "score", "a", "b"]
    assert [row.split()[0] for row in rows] == [str(one["clip_index"] + 1) for one in record["candidates"]]
    assert [row.split()[-1] == "kept" for row in rows] == [True, False, False]

    quiet = [*common, "-o", str(tmp_path / "c.wav"), "--quiet"]
    assert cli.run(["generate", PROMPT, *QUICK, *quiet]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank_by", ["reward", "clap"])
def test_services_choose_as_the_client_does(
    rank_by: client.RankBy,
    services: Services,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judge = ["--reward-server", services.reward] if rank_by == "reward" else ["--scoring", services.scoring]
    # More than the service makes in one call.
    flags = ["--server", services.generation, *judge, "--rank-by", rank_by, "--candidates", "10"]
    record = generated([*flags, "-o", str(tmp_path / "best.wav")], capsys)
    with client.AudioClient(services.generation, scoring=services.scoring, reward=services.reward) as audio:
        best = audio.generate_best(
            PROMPT, candidates=10, rank_by=rank_by, seed=7, num_inference_steps=2, duration=0.64
        )
    # A batch's shape moves the last digits, which may put near equals into another order.
    told = {(one["seed"], one["clip_index"]): one["value"] for one in record["candidates"]}
    assert len(told) == 10
    for one in best.candidates:
        assert told[one.clip.seed, one.clip.index] == pytest.approx(one.value, abs=1e-4)
    assert [model["digest"] for model in record["judges"]] == [model.digest for model in best.scorers]
    kept = record["clips"][0]
    assert told[kept["seed"], kept["clip_index"]] == max(told.values())


def test_services_make_and_this_process_judges(
    models: Models, services: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--server", services.generation, *models.rewards, "--candidates", "2"]
    record = generated([*flags, "-o", str(tmp_path / "a.wav")], capsys)
    assert record["judges"][0]["name"] == "tiny-reward"


def test_a_folder_of_the_best(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "p.jsonl", tmp_path / "clips"
    lines = [{"prompt": PROMPT, "id": "one"}, {"prompt": "a bell rings", "id": "two", "clip_count": 2}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = [
        "generate",
        "--prompts",
        str(file),
        "-o",
        str(folder),
        "--model",
        f"file:{models.sound}",
        *QUICK,
    ]
    assert cli.run([*common, *models.rewards, "--candidates", "3"]) == 0
    assert "2 made, 0 there already" in capsys.readouterr().err
    names = {"one.wav", "one.json", "two-1.wav", "two-2.wav", "two.json", "index.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "two.json").read_text())
    assert record["request"]["settings"]["candidates"] == 3
    assert len(record["candidates"]) == 3
    assert [clip["clip_index"] for clip in record["clips"]] == [
        one["clip_index"] for one in record["candidates"] if one["kept"]
    ]

    assert cli.run([*common, *models.rewards, "--candidates", "3"]) == 0
    assert "0 made, 2 there already" in capsys.readouterr().err
    assert cli.run([*common, *models.rewards, "--candidates", "4"]) == 2
    assert "candidates 3, now 4" in capsys.readouterr().err
    assert cli.run(common) == 2
    assert "candidates 3, now None" in capsys.readouterr().err
    assert cli.run([*common, *models.rewards, "--candidates", "1", "--overwrite"]) == 2
    assert "two: clip_count is 2" in capsys.readouterr().err

    # The index is what `milonga score` takes.
    assert cli.run(["score", "--prompts", str(folder / "index.jsonl"), *models.judges]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank-by", "clap"], "--rank-by: chooses among candidates"),
        (["--scoring", "x:1"], "--scoring"),
        (["--candidates", "2", "--clips", "3"], "--clips: is 3"),
        (["--candidates", "2", "--scorer", "a=mini:clap-a"], "--rank-by clap"),
        (["--candidates", "2", "--rank-by", "clap", "--reward", "mini"], "--rank-by reward"),
        (["--candidates", "2", "--server", "x:1"], "--reward-server: is needed"),
        (["--candidates", "2", "--server", "x:1", "--rank-by", "clap"], "--scoring: is needed"),
        (["--candidates", "2", "--model", "nonsense", "MODELS"], "--model: is 'nonsense'"),
        (["--candidates", "2", "--reward", "nonsense"], "--reward: is 'nonsense'"),
    ],
)
def test_wrong_flags_of_candidates(
    arguments: list[str],
    says: str,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word for one in arguments for word in (models.rewards if one == "MODELS" else [one])]
    assert cli.run(["generate", PROMPT, *given]) == 2
    assert says in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_scorer_is_reported_before_any_clip_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, told = f"127.0.0.1:{free_port()}", Told()
    with serving(told) as target:
        words = ["--server", target, "--candidates", "2", "--reward-server", address]
        assert cli.run(["generate", PROMPT, *words, "-o", str(tmp_path / "a.wav")]) == 3
    assert error_of(capsys).startswith(f"error: {address}: ")
    assert told.requests == []
    assert list(tmp_path.iterdir()) == []


def test_settings_of_candidates_are_named_as_flags(
    services: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--server", services.generation, "--reward-server", services.reward, "--candidates", "2"]
    assert cli.run(["generate", PROMPT, *flags, "--steps", "0", "-o", str(tmp_path / "a.wav")]) == 2
    assert "--steps: " in error_of(capsys)
    # A clip that no judge takes: 0.08 s is shorter than they hear.
    short = ["--duration", "0.08", "--steps", "1", "-o", str(tmp_path / "a.wav")]
    assert cli.run(["generate", PROMPT, *flags, *short]) == 2
    assert "candidate 1: lasts 0.0" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "offline"),
    [
        ("hf:laion/clap", False),
        ("laion:clap.pt", False),
        ("laion-clap:clap.pt", False),
        ("mini:clap-a", True),
    ],
)
def test_the_hub_may_be_used_for_models_that_may_need_it(
    uri: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert cli.run(["score", "A dog barks", "missing.wav", "--scorer", f"a={uri}"]) == 2
    assert ("HF_HUB_OFFLINE" in os.environ) == offline

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("MILONGA_SCORERS", json.dumps({"a": uri}))
    assert cli.run(["score", "A dog barks", "missing.wav"]) == 2
    assert ("HF_HUB_OFFLINE" in os.environ) == offline
