"""The `milonga` command as a person or a script meets it: real files, a real (tiny) model, a real service."""

import io
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from examples import demo
from services import cli
from services.api.scoring import Reward
from services.cli import doctor, prompts
from services.cli.progress import stage_of
from services.client import Clip, GenerationOptions, Progress, Queued
from services.errors import (
    DeadlineExceededError,
    DigestMismatchError,
    InvalidInputError,
    MilongaError,
    OutputError,
    QueueFullError,
)
from services.files import write_atomically
from services.models.manifest import write_manifest
from services.processes import free_port
from tests.programs import Services
from tests.services.models.tango.released import write_released
from tests.tiny import tiny_captioner, tiny_clap, tiny_pipeline, tiny_reward

PROMPT = "a dog barks then a siren wails"
QUICK = ("--steps", "2", "--duration", "0.64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a tiny model's folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    write_manifest(folder, name="tiny", version="1", license="Apache-2.0")
    return f"file:{folder}"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


# The command


def test_help_needs_no_torch_and_documents_the_exit_codes() -> None:
    program = (
        "import sys; from services.cli import run; code = run(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout
    for command in ("generate", "score", "serve", "up", "convert", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DigestMismatchError("x"), 2),
        (QueueFullError("x", retry_after=1.0), 3),
        (DeadlineExceededError("x"), 3),
        (OutputError("x"), 4),
        (KeyboardInterrupt(), 130),
        (MilongaError("x"), 1),
        (ZeroDivisionError(), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert cli.exit_code(error) == code


def test_every_error_of_the_tree_but_its_root_has_an_exit_code() -> None:
    tree = [kind for kind in MilongaError.__subclasses__() if kind.__module__ == MilongaError.__module__]
    assert {kind for kind in tree if not cli.EXIT_CODES.keys() & set(kind.__mro__)} == set()


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["generate", "--nonsense"], ["generate", PROMPT, "--seed", "x"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert "Usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "PROMPT"),
        (["generate", PROMPT, "--prompts", "x.jsonl"], "PROMPT"),
        (["generate", PROMPT, "-o", "clip.m4a"], ".wav, .flac, .ogg, .mp3, .opus"),
        (["generate", PROMPT, "--overwrite"], "--prompts"),
        (["generate", PROMPT, "--server", "localhost:1", "--device", "cpu"], "--device"),
        (["generate", PROMPT, "--tls"], "--server"),
        (["generate", PROMPT, "--timeout", "5"], "--server"),
        (["generate", PROMPT, "--server", "localhost:1", "--timeout", "nan"], "--timeout"),
        (["generate", PROMPT, "--server", ""], "--server"),
        (["generate", PROMPT, "--server", "http://host:50051"], "--server: is 'http://host:50051', a URL;"),
        (["generate", PROMPT, "--server", "host"], "--server: is 'host', which has no port;"),
        (["generate", PROMPT, "--server", "host:1", "--tls-ca", "none.pem"], "--tls-ca: is none.pem, which"),
        (["generate", PROMPT, "--spectrogram", "clip.wav"], ".png"),
        (["generate", "--prompts", "none.jsonl", "-o", "x"], "none.jsonl"),
        (["generate", PROMPT, "--model", "nonsense"], "nonsense"),
        (["generate", PROMPT, "--model", "file:nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    assert says in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_output_not_writable_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", PROMPT, "-o", str(tmp_path / "nowhere" / "clip.wav")]) == 4
    assert "nowhere does not exist" in error_of(capsys)
    long = tmp_path / ("a" * 250 + ".wav")
    assert cli.run(["generate", PROMPT, "-o", str(long), "--model", "file:nowhere"]) == 4
    assert "can't be written" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_stdout_is_no_fault_of_ours() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", "generate", "--help"], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 4
    assert done.stderr.startswith(b"error: the output can't be written")


def test_a_service_that_is_not_there_is_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"127.0.0.1:{free_port()}"
    assert cli.run(["generate", PROMPT, "-o", str(tmp_path / "a.wav"), "--server", target]) == 3
    assert target in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


# One prompt, engine in the process


def test_generate_writes_sound_and_spectrogram(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, picture = tmp_path / "clip.wav", tmp_path / "clip.png"
    arguments = ["generate", PROMPT, "-o", str(clip), "--seed", "7", "--spectrogram", str(picture)]
    assert cli.run([*arguments, "--model", model, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(clip), str(picture)]
    assert "error" not in err
    waveform_N, rate = soundfile.read(clip)
    assert (len(waveform_N), rate) == (10_240, 16_000)
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.png", "clip.wav"]


def test_several_clips_json_and_resampling(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", PROMPT, "-o", str(tmp_path / "c.flac"), "--clips", "2", "--seed", "3", "--json"]
    assert cli.run([*arguments, "--sample-rate", "8000", "--model", model, *QUICK]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [Path(clip["location"]).name for clip in report["clips"]] == ["c-1.flac", "c-2.flac"]
    assert {clip["seed"] for clip in report["clips"]} == {3}
    assert report["model"]["name"] == "tiny"
    assert report["model"]["digest"].startswith("sha256:")
    sounds = [soundfile.read(clip["location"]) for clip in report["clips"]]
    assert [(len(waveform_N), rate) for waveform_N, rate in sounds] == [(5_120, 8_000)] * 2
    assert not np.array_equal(sounds[0][0], sounds[1][0])


def test_same_seed_same_file(model: str, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        arguments = ["generate", PROMPT, "-o", str(tmp_path / name), "--seed", "7"]
        assert cli.run([*arguments, "--model", model, *QUICK]) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_every_wrong_setting_is_named_as_its_flag(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", PROMPT, "-o", str(tmp_path / "a.wav"), "--model", model]
    wrong = ["--steps", "0", "--guidance", "nan", "--duration", "99", "--clips", "0", "--sample-rate", "7"]
    wrong += ["--guidance-stop", "2", "--scheduler", "magic", "--profile", "best"]
    assert cli.run([*arguments, *wrong]) == 2
    line = error_of(capsys)
    flags = ("--steps:", "--guidance:", "--duration:", "--clips:", "--sample-rate:", "--scheduler:")
    for flag in flags:
        assert flag in line
    assert "--guidance-stop: is 2, must be between 0 and 1" in line
    assert "--profile: is 'best', must be one of quality, draft" in line
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_the_model_does_not_know_is_a_warning_on_stderr(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.run(["generate", "a xylophone rings", "-o", str(tmp_path / "a.wav"), "--model", model, *QUICK])
        == 0
    )
    assert re.search(r"^warning: .*xylophone", capsys.readouterr().err, re.MULTILINE)


# One prompt, through a service


def test_server_and_engine_make_the_same_clip(services: Services, tmp_path: Path) -> None:
    common = ["generate", PROMPT, "--seed", "7", *QUICK]
    assert cli.run([*common, "-o", str(tmp_path / "here.wav"), "--model", "mini"]) == 0
    assert cli.run([*common, "-o", str(tmp_path / "there.wav"), "--server", services.generation]) == 0
    here_N, there_N = (soundfile.read(tmp_path / name)[0] for name in ("here.wav", "there.wav"))
    # Not bit for bit: the two processes may run torch with different numbers of threads.
    assert np.abs(here_N - there_N).max() <= 2 / 32768


def test_the_service_names_wrong_settings_too(
    services: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", " ", "-o", str(tmp_path / "a.wav"), "--server", services.generation]
    assert cli.run([*arguments, "--steps", "-1"]) == 2
    line = error_of(capsys)
    assert "PROMPT:" in line
    assert "--steps:" in line


def test_port_taken_is_one_line(model: str, services: Services) -> None:
    arguments = ["serve", "generation", "--model", model, "--listen", services.generation]
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (2, 3, 4), done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]


# Many prompts


def write_prompts(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_folder_of_clips_is_resumable(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_prompts(
        tmp_path / "p.jsonl", {"prompt": PROMPT}, {"prompt": "a bell rings", "id": "bell", "seed": 5}
    )
    folder = tmp_path / "clips"
    arguments = ["generate", "--prompts", str(file), "-o", str(folder), "--model", model, *QUICK]
    assert cli.run(arguments) == 0
    assert "2 made, 0 there already" in capsys.readouterr().err
    first = "00001-a-dog-barks-then-a-siren"
    names = {f"{first}.wav", f"{first}.json", "bell.wav", "bell.json", "index.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert [(row["location"], row["captions"]) for row in index] == [
        (f"{first}.wav", PROMPT),
        ("bell.wav", "a bell rings"),
    ]
    assert index[1]["seed"] == 5

    before = {name: (folder / name).read_bytes() for name in names}
    stamps = {name: (folder / name).stat().st_mtime_ns for name in names - {"index.jsonl"}}
    assert cli.run(arguments) == 0
    assert "0 made, 2 there already" in capsys.readouterr().err
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps

    # Killed after one clip: only what is missing is made, and comes out as it was.
    (folder / "bell.json").unlink()
    assert cli.run(arguments) == 0
    assert "1 made, 1 there already" in capsys.readouterr().err
    assert (folder / "bell.wav").read_bytes() == before["bell.wav"]


def test_other_settings_are_refused_before_anything_is_made(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", {"prompt": PROMPT, "id": "a"})
    arguments = ["generate", "--prompts", str(file), "-o", str(tmp_path / "c"), "--model", model]
    assert cli.run([*arguments, *QUICK]) == 0
    record = (tmp_path / "c" / "a.json").read_bytes()
    capsys.readouterr()
    assert cli.run([*arguments, "--steps", "3", "--duration", "0.64"]) == 2
    assert "num_inference_steps 2, now 3" in error_of(capsys)
    assert (tmp_path / "c" / "a.json").read_bytes() == record
    assert cli.run([*arguments, "--steps", "3", "--duration", "0.64", "--overwrite"]) == 0
    assert (tmp_path / "c" / "a.json").read_bytes() != record


def test_a_refused_prompt_does_not_stop_the_others(
    services: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_prompts(
        tmp_path / "p.jsonl",
        {"prompt": PROMPT, "id": "bad", "duration": 99},
        {"prompt": PROMPT, "id": "good"},
    )
    folder = tmp_path / "clips"
    assert (
        cli.run(
            ["generate", "--prompts", str(file), "-o", str(folder), "--server", services.generation, *QUICK]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert "1 made, 0 there already, 1 refused" in err
    assert "error: bad: duration" in err
    assert {path.name for path in folder.iterdir()} == {"good.wav", "good.json", "index.jsonl"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON"),
        ('"a dog"', "object"),
        ("{}", "no prompt"),
        ('{"prompt": 3}', "prompt is 3, must be str"),
        ('{"prompt": "x", "sead": 1}', "unknown field sead"),
        ('{"prompt": "x", "seed": true}', "seed is True, must be int"),
        ('{"prompt": "x", "id": "../x"}', "must be a file name"),
        ('{"prompt": "x", "id": "OK"}', "earlier line"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x", "id": "ok"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InvalidInputError) as caught:
        prompts.read_jobs(file, {})
    assert [violation.field for violation in caught.value.violations] == ["p.jsonl:3"]
    assert says in str(caught.value)


def test_a_table_of_prompts_has_options_in_its_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.csv"
    file.write_text("youtube_id,caption,seed,duration,scheduler\nab,Rain,7,2,ddim\ncd,Birds,,2.5,\n")
    first, second = prompts.read_jobs(file, {"scheduler": "euler"})
    assert {**first.options} == {"seed": 7, "duration": 2, "scheduler": "ddim"}
    assert (second.options["duration"], second.options["scheduler"]) == (2.5, "euler")
    assert (first.name, second.name) == ("00002-rain", "00003-birds")
    assert "youtube_id are not used" in capsys.readouterr().err
    for column, says in (("steps", "unknown field steps"), ("seed", "seed is 'x', must be int")):
        file.write_text(f"caption,{column}\nRain,x\n")
        with pytest.raises(InvalidInputError, match=says):
            prompts.read_jobs(file, {})


def test_each_caption_of_a_row_has_its_own_files(tmp_path: Path) -> None:
    file = tmp_path / "clotho.csv"
    file.write_text("file_name,caption_1,caption_2,caption_3\nx.wav,Rain,Rain,Rain falls\n")
    names = [job.name for job in prompts.read_jobs(file, {})]
    assert names == ["00002-1-rain", "00002-2-rain", "00002-3-rain-falls"]
    file = write_prompts(tmp_path / "p.jsonl", {"id": "a", "caption": ["Rain", "Birds"], "seed": None})
    assert [job.name for job in prompts.read_jobs(file, {})] == ["a-1", "a-2"]


def test_clips_of_two_lines_never_share_a_file(tmp_path: Path) -> None:
    file = write_prompts(
        tmp_path / "p.jsonl", {"prompt": "x", "id": "a", "clip_count": 2}, {"prompt": "x", "id": "A-2"}
    )
    with pytest.raises(InvalidInputError, match="A-2"):
        prompts.read_jobs(file, {})


def test_many_wrong_lines_are_counted(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", *[{}] * 9)
    with pytest.raises(InvalidInputError, match=r"p\.jsonl:5: has no prompt; …: and 4 more"):
        prompts.read_jobs(file, {})


def test_a_line_goes_before_the_command_and_seeds_are_stable(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", {"prompt": "x", "num_inference_steps": 9}, {"prompt": "x"})
    options: GenerationOptions = {"num_inference_steps": 4, "seed": None}
    first, second = prompts.read_jobs(file, options)
    assert (first.options["num_inference_steps"], second.options["num_inference_steps"]) == (9, 4)
    assert first.options["seed"] != second.options["seed"]
    assert prompts.read_jobs(file, options) == (first, second)
    assert {job.options["seed"] for job in prompts.read_jobs(file, {"seed": 1})} == {1}


# Converting


def test_a_released_checkpoint_is_converted_and_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released, target = write_released(tmp_path / "released"), tmp_path / "tango2"
    arguments = ["convert", str(released), str(target), "--text-encoder", str(released / "flan-t5-tiny")]
    assert cli.run([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    clip = tmp_path / "clip.wav"
    assert cli.run(["generate", PROMPT, "-o", str(clip), "--model", f"file:{target}", *QUICK]) == 0
    assert soundfile.info(clip).frames == 10_240
    capsys.readouterr()
    assert cli.run(arguments) == 4
    assert str(target) in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", str(tmp_path), str(tmp_path / "t"), "--text-encoder", str(tmp_path)]) == 2
    assert "main_config.json" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


# Files


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on file size fails a write half-way, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match=r"clip\.wav can't be written"):
            write_atomically(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# What is shown


def test_stages_are_named() -> None:
    def progress(step: int) -> Progress:
        return Progress(clip_index=0, step=step, num_inference_steps=5, fraction=step / 5, seconds_left=None)

    clip = Clip(audio=b"", encoding="wav", sampling_rate=16_000, duration=1.0, index=0, seed=0)
    assert [stage_of(update) for update in (Queued(position=2), progress(3), progress(5), clip)] == [
        "queued behind 2",
        "denoising 3/5",
        "decoding",
        "decoding",
    ]


# Doctor


def test_doctor_json_names_what_is_there(capsys: pytest.CaptureFixture[str], model: str) -> None:
    cli.run(["doctor", "--json", "--model", model])
    report = json.loads(capsys.readouterr().out)
    checks = {(check["group"], check["name"]): check for check in report["checks"]}
    assert checks["packages", "grpcio"]["status"] == "ok"
    assert checks["packages", "torch"]["status"] == "ok"
    assert checks["devices", "cpu"]["status"] == "ok"
    assert "sha256:" in checks["models", model]["found"]
    assert report["healthy"] == all(check["status"] != "missing" for check in report["checks"])


def test_doctor_ends_with_1_where_something_needed_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--model", "file:nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().out


def test_doctor_finds_what_serve_would_refuse(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model.removeprefix("file:"), tmp_path / "cut"))
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    write_manifest(folder, name="cut", version="1", license="unknown")
    assert cli.run(["doctor", "--json", "--model", f"file:{folder}"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks[f"file:{folder}"]["status"] == "missing"
    assert "truncated" in checks[f"file:{folder}"]["found"]


def test_doctor_knows_every_kind_of_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clap, whole, cut = tiny_clap(), tmp_path / "whole", tmp_path / "cut"
    clap.save(whole / "clap")
    tiny_reward(clap).save(whole / "reward")
    tiny_captioner().save_pretrained(whole / "captioner")
    shutil.copytree(whole, cut)
    files = {name: f"{name}/model.safetensors" for name in ("clap", "reward")}
    files["captioner"] = "captioner/projector.safetensors"
    for file in files.values():
        (cut / file).write_bytes((whole / file).read_bytes()[:-9])
    flags = [f"--model=file:{folder / name}" for folder in (whole, cut) for name in files]
    cli.run(["doctor", "--json", *flags])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    for name in files:
        assert checks[f"file:{whole / name}"]["status"] == "ok"
        assert checks[f"file:{cut / name}"]["status"] == "missing"
    # Whether they are there depends on what is installed; that they are looked for does not.
    embedded = {"mini", "mini-base", "mini:clap-a", "mini:clap-b", "mini:reward", "mini:captioner"}
    assert embedded <= checks.keys()


def test_doctor_says_where_laion_clap_belongs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions: dict[str, str | None] = {"numpy": "2.4.0", "laion-clap": None}
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, installed(name)))
    (note,) = [check for check in doctor.package_checks() if check.name == "[laion-clap]"]
    assert note.status == "note"
    assert "separate environment" in note.remedy
    versions["laion-clap"] = "1.1.7"
    found = [check for check in doctor.package_checks() if check.name == "laion-clap"]
    assert [check.status for check in found] == ["ok", "missing"]
    assert "numpy 2.4.0" in found[1].found


def test_doctor_wants_what_pyproject_says() -> None:
    wanted = {requirement.name for requirement in doctor.requirements()}
    assert {"grpcio", "torch", "diffusers", "accelerate"} <= wanted


# The demo


def test_the_demo_page_needs_no_other_file(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: GenerationOptions = {"seed": 7, "num_inference_steps": 2, "duration": 0.64}
    page = demo.run(tmp_path / "demo", model, options).read_text(encoding="utf-8")
    assert page.count('<audio controls preload="metadata" src="data:audio/wav;base64,') == 3
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    for number, prompt in enumerate(demo.PROMPTS, start=1):
        assert prompt in page
        sound = (tmp_path / "demo" / f"clip-{number}.wav").read_bytes()
        assert soundfile.info(io.BytesIO(sound)).samplerate == 16_000
    for name in ("generation", "scoring", "reward"):
        log = (tmp_path / "demo" / f"{name}.log").read_text(encoding="utf-8")
        assert "stopped" in log
        assert "Traceback" not in log
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["prompt", "clap-a", "clap-b"]
    (start,) = (number for number, row in enumerate(rows) if row.startswith("The reward model likes "))
    for prompt in demo.PROMPTS:
        place = rows.index(f"  {prompt}", start)
        assert "The reward model " in rows[place + 1]
        assert rows[place + 2].startswith("    The captioner says: ")


def test_the_demo_says_in_words_what_the_reward_model_likes() -> None:
    scored = [
        [demo.PairScores(scores=(), reward=Reward.of(logit)) for _ in range(2)] for logit in (3.0, -3.0)
    ]
    lines = demo.report(("rain", "a dog"), scored, ("rain falls", "a bell"))
    assert lines[0] == "The reward model likes 1 of 2 clips:"
    assert lines[1:4] == [
        "  rain",
        "    The reward model likes it: probability 0.95 that a listener calls it right.",
        "    The captioner says: rain falls",
    ]
    assert "does not like it: probability 0.05" in lines[5]
    assert "milonga generate --candidates 4" in lines[7]


def test_a_demo_whose_service_does_not_come_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(MilongaError, match="nowhere"):
        demo.run(tmp_path / "demo", "file:nowhere", {})
