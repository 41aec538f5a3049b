"""`milonga explain` on the embedded model, with as few steps as will do."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from services.cli import run
from tests.programs import Services
from tests.services.audio.sounds import tone

PROMPT = "A dog barks then a siren wails"
WORDS = PROMPT.split()
QUICK = ["--steps", "2", "--seed", "7", "-q"]


def page_data(page: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_every_file_of_several_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"why.{kind}" for kind in ("html", "npz", "json", "png")]
    outputs = [word for path in paths for word in ("-o", str(path))]
    methods = ["--method", "occlusion", "--method", "attention", "--method", "mask", "--iterations", "2"]
    audio = tmp_path / "clip.flac"
    command = [
        "explain",
        PROMPT,
        *QUICK,
        *outputs,
        *methods,
        "--without",
        "Siren WAILS",
        "--audio",
        str(audio),
    ]
    assert run(command) == 0
    assert capsys.readouterr().out.split() == [str(path) for path in (*paths, audio)]
    html, npz, numbers, png = paths

    page = html.read_text(encoding="utf-8")
    # Self-contained: no address but data.
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|https?://""", page)
    data = page_data(page)
    assert data["words"] == WORDS and data["prompt"] == PROMPT
    assert [one["name"] for one in data["methods"]] == ["occlusion", "attention", "mask"]
    assert all(np.shape(one["values"]) == (7, 32) for one in data["methods"])
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(data["audio"].partition(",")[2])))
    assert len(sound) / rate == pytest.approx(data["duration"]) == pytest.approx(2.56)
    (variant,) = data["variants"]
    assert "Siren WAILS" in variant["title"]
    for image in (data["spectrogram"], variant["spectrogram"], variant["difference"]):
        Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).verify()

    with np.load(npz) as arrays:
        assert arrays["words"].tolist() == WORDS and int(arrays["seed"]) == 7
        assert arrays["matrix"].shape == (7, 32) and arrays["matrix"].dtype == np.float32
        np.testing.assert_array_equal(arrays["matrix"], arrays["matrix_occlusion"])
        assert (arrays["matrix_mask"] <= 1).all() and (arrays["matrix_attention"] >= 0).all()
        assert arrays["audio"].shape == arrays["audio_without"].shape == (40_960,)
        assert arrays["difference_db_without"].any()
        assert float(arrays["frame_seconds"]) == pytest.approx(0.08)
        matrix = arrays["matrix"]
    record = json.loads(numbers.read_text(encoding="utf-8"))
    np.testing.assert_allclose(record["explanations"][0]["matrix"], matrix, rtol=1e-5)
    assert record["explanations"][2]["mask_size"] > 0
    with Image.open(png) as picture:
        assert picture.width > 1_200 and picture.height > 900
    assert soundfile.info(audio).samplerate == 16_000


def test_json_and_the_default_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["explain", "A dog barks loudly", *QUICK, "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["files"] == ["why.html"] and (tmp_path / "why.html").exists()
    assert record["words"] == ["A", "dog", "barks", "loudly"]
    assert len(record["explanations"][0]["peaks"]) == 4
    assert "warning: prompt has words that the model does not know: loudly" in captured.err


def test_a_service_explains_a_clip(
    services: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, tone(1.5, rate=44_100), 44_100)
    output = tmp_path / "why.npz"
    words = ["explain", "A machine beeps", "--clip", str(clip), "--server", services.explanation]
    assert run([*words, *QUICK, "-o", str(output)]) == 0
    assert capsys.readouterr().out.split() == [str(output)]
    with np.load(output) as arrays:
        assert len(arrays["audio"]) == 66_150 and int(arrays["sampling_rate"]) == 44_100
        assert arrays["matrix"].shape[1] == 19  # 1.5 s in frames of 80 ms


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (
            [PROMPT, "--without", "cat"],
            "--without: is 'cat', which is not in the prompt; its words are A, dog",
            2,
        ),
        ([PROMPT, "--replace-by", "cat"], "--replace-by: is given without the words that it replaces", 2),
        ([""], "PROMPT: is empty", 2),
        (["rain " * 65], "PROMPT: has 65 words, must have at most 64", 2),
        ([PROMPT, "--method", "magic"], "--method: is 'magic'", 2),
        ([PROMPT, "--steps", "0"], "--steps: is 0", 2),
        ([PROMPT, "-o", "why.txt"], "--output: why.txt must end in one of .html, .json, .npz, .png", 2),
        ([PROMPT, "-o", "no/folder/why.png"], "no/folder does not exist", 4),
        ([PROMPT, "--clip", "none.wav"], "--clip: is none.wav, which can't be read", 2),
        ([PROMPT, "--server", "localhost:1", "--model", "mini"], "--model, --device, --dtype: are set", 2),
        ([PROMPT, "--model", "file:nowhere"], "nowhere", 2),
        ([PROMPT, "--tls"], "give --server as well", 2),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["explain", *words]) == code
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_a_clip_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, tone(6.0), 16_000)
    assert run(["explain", PROMPT, "--clip", str(clip), "-o", str(tmp_path / "why.html")]) == 2
    error = capsys.readouterr().err
    assert "--clip: lasts 6 s, must be between 0.08 and 5.12 s; cut it" in error
    assert not (tmp_path / "why.html").exists()


HOSTILE = 'A dog <img src="https://example.org/x"> </script><script>barks</script> <!-- then'


def test_a_prompt_can_not_break_out_of_the_page(tmp_path: Path) -> None:
    output = tmp_path / "why.html"
    assert run(["explain", HOSTILE, *QUICK, "-o", str(output)]) == 0
    page = output.read_text(encoding="utf-8")
    assert page_data(page)["prompt"] == HOSTILE
    assert page.count("</script>") == 2 and "<!--" not in page


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_runs_the_page(tmp_path: Path) -> None:
    output = tmp_path / "why.html"
    assert run(["explain", PROMPT, *QUICK, "--without", "siren", "-o", str(output)]) == 0
    browser = [
        *(
            str(CHROMIUM),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'user'}",
        ),
        *("--virtual-time-budget=5000", "--dump-dom", output.as_uri()),
    ]
    dom = subprocess.run(browser, check=True, capture_output=True, text=True, timeout=120).stdout
    # What its script adds: a band per word, the table, the variant and the words of the legend.
    assert dom.count('class="track band"') == 7
    assert dom.count('scope="row"') == 7
    assert "Without “siren”" in dom
    assert "shaded by the square root" in dom
    assert 'aria-valuetext="“A” 0.00–0.08 s' in dom
