"""`milonga train listen`: a page of recordings and of models' clips of the same prompts."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services.cli import run
from services.errors import InvalidInputError
from services.models.manifest import write_manifest
from tests.tiny import tiny_pipeline
from training.evaluation.config import Sampling
from training.evaluation.prompts import world_prompts
from training.runs.listening import Listening, listen

RATE = 16_000
SOUND = re.compile(r'src="data:audio/flac;base64,([^"]+)"')


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    found = []
    for seed, name in enumerate(("before", "after")):
        folder = tmp_path / name
        tiny_pipeline(seed).save_pretrained(folder)
        write_manifest(folder, name="tiny", version=str(seed), license="Apache-2.0")
        found.append(f"{name}=file:{folder}")
    return found


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Twelve recordings with captions, the last four of a fold that is held out; one caption stands twice."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    rows = []
    for number in range(12):
        tone = np.sin(np.arange(3 * RATE) * (number + 1) / 40) * 0.1
        soundfile.write(folder / f"{number}.wav", tone, RATE)
        caption = f"<b>sound</b> {min(number, 10)}"
        rows.append(
            {"location": f"{number}.wav", "caption": caption, "split": "test" if number > 7 else "train"}
        )
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_has_the_first_held_out_recordings_and_all_models(
    models: list[str], recordings: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    command = ["train", "listen", *models, "--recordings", str(recordings), "--steps", "1", "-n", "3"]
    assert run([*command, "-o", str(page), "--cache", str(tmp_path / "clips")]) == 0
    text = page.read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == [f"&lt;b&gt;sound&lt;/b&gt; {number}" for number in (8, 9, 10)]
    sounds = [soundfile.read(io.BytesIO(base64.b64decode(one))) for one in SOUND.findall(text)]
    assert len(sounds) == 3 * 3 == text.count("data:image/png;base64,")
    assert re.findall("<figcaption>(.*?)<span>", text) == ["recording", "before", "after"] * 3
    waveform, rate = sounds[0]
    original, _ = soundfile.read(recordings / "8.wav")
    assert (rate, len(waveform)) == (RATE, len(sounds[1][0])), "as long as the models' clips"
    assert np.corrcoef(waveform, original[: len(waveform)])[0, 1] > 0.99
    assert 20 * np.log10(np.sqrt(np.square(waveform).mean())) == pytest.approx(-20, abs=0.1)
    assert not np.array_equal(sounds[1][0], sounds[2][0])
    assert "<script" not in text and "what is held out: fold test" in text


def test_without_recordings_the_prompts_are_the_test_split_of_the_sound_world(
    models: list[str], tmp_path: Path
) -> None:
    config = Listening(count=2, sampling=Sampling(num_inference_steps=1))
    found = listen(config, models[:1], tmp_path / "clips")
    assert [text for text, _ in found.prompts] == [one.text for one in world_prompts(2, "test")]
    assert [sound.title for _, sounds in found.prompts for sound in sounds] == ["sound world", "before"] * 2


def test_what_can_not_be_listened_to_is_refused(models: list[str], recordings: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips-of-a-model"
    folder.mkdir()
    (folder / "index.jsonl").write_text(json.dumps({"prompt": "a dog barks", "audio": "a.wav"}) + "\n")
    for sources, reason in (
        (["same=mini", "same=mini-base"], "same is the name of two models; give NAME=URI"),
        ([str(folder)], "is a folder of clips; give the URI of a model"),
    ):
        with pytest.raises(InvalidInputError, match=reason):
            listen(Listening(), sources, tmp_path / "cache")
    (recordings / "8.wav").write_bytes(b"no sound")
    with pytest.raises(InvalidInputError, match=r"--recordings: .*8\.wav can't be read"):
        listen(Listening(recordings=recordings), models[:1], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
