"""AudioSeal with random weights of the real architecture, in the format of the released checkpoints.

Random weights hide and detect nothing. What is tested is that files are read as the package reads them, that
the message reaches the samples, and that clips keep their length, rate and bounds.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.watermark import CHANGES, RATE, bits_right, signal_to_noise
from services import cli
from services.api.generation import GenerationOptions
from services.audio.encoding import decode_audio, encode_audio
from services.errors import ModelFormatError, UnsupportedError
from services.generation.settings import GenerationSettings
from services.generation.slot import load_engine
from services.models.watermark import BITS, Detection, message_of
from services.models.watermark import audioseal as module
from services.models.watermark.audioseal import (
    AudioSealDetector,
    AudioSealWatermark,
    load_detector,
    load_generator,
    merged,
)
from services.runtime.settings import load_settings
from services.weights.uri import resolve

pytest.importorskip("audioseal", reason="needs the extra watermark")
# torch.jit.script and weight_norm, by which the package is built, are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def released(model: nn.Module) -> dict[str, Tensor]:
    """Return weights as released files hold them: names of version 0.1, with weight normalisation."""
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        old = key.replace(".inner_conv.", ".")
        if key.endswith(".inner_conv.weight"):
            g = value.flatten(1).norm(dim=1).reshape(-1, 1, 1)
            found |= {f"{old}_g": g, f"{old}_v": 3 * value / g}  # of any length: only its direction counts
        else:
            found[old] = value
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of a generator and a detector with random weights."""
    folder = tmp_path_factory.mktemp("audioseal")
    generator, detector = folder / "generator_base.pth", folder / "detector_base.pth"
    torch.manual_seed(0)
    torch.save({"model": released(load_generator(None)), "xp.cfg": {"seanet": {}}}, generator)
    torch.manual_seed(1)
    torch.save(released(load_detector(None)), detector)
    return generator, detector


def _clip(seconds: float, rate: int) -> np.ndarray:
    time_N = np.arange(round(seconds * rate)) / rate
    return (0.2 * np.sin(2 * np.pi * 440 * time_N)).astype(np.float32)


def test_released_files_give_the_weights_that_they_were_made_of(files: tuple[Path, Path]) -> None:
    for number, (path, load) in enumerate(zip(files, (load_generator, load_detector), strict=True)):
        torch.manual_seed(number)
        expected = load(None).state_dict()
        found = load(path).state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


def test_merging_is_that_of_the_package(files: tuple[Path, Path]) -> None:
    from audioseal.loader import convert_state_dict_for_scriptable_model, load_state_dict

    weights = torch.load(files[1], weights_only=True)
    theirs = load_detector(None)
    load_state_dict(theirs, convert_state_dict_for_scriptable_model(weights))
    ours = merged(weights)
    assert ours.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours[key], value)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_marked_clip_has_its_length_and_bounds_and_depends_on_the_message(
    files: tuple[Path, Path], rate: int
) -> None:
    watermark, clip_N = AudioSealWatermark(files[0]), _clip(0.5, rate)
    one, other, again = (watermark.embed(clip_N, rate, message) for message in (0, 2**BITS - 1, 0))
    assert one.shape == clip_N.shape
    assert one.dtype == np.float32
    assert np.abs(one).max() <= 1
    assert np.array_equal(one, again)
    assert not np.array_equal(one, clip_N)
    assert not np.array_equal(one, other)


def test_a_detection_is_the_packages_own(files: tuple[Path, Path]) -> None:
    clip_N = _clip(0.5, 16_000)
    found = AudioSealDetector(files[1]).detect(clip_N, 16_000)
    with torch.inference_mode():
        share, bits = load_detector(files[1]).detect_watermark(torch.from_numpy(clip_N)[None, None])
    assert found.share == pytest.approx(float(share))
    assert [found.message >> place & 1 for place in range(BITS)] == bits[0].tolist()
    assert found.marked == (found.share > 0.5)


def test_messages_are_the_first_bits_of_a_digest() -> None:
    assert message_of("sha256:abcd" + "0" * 60) == 0xABCD
    assert message_of("") == 0


def test_other_files_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="of another model"):
        AudioSealWatermark(files[1])
    (tmp_path / "x.pth").write_bytes(b"RIFF")
    with pytest.raises(ModelFormatError):
        AudioSealDetector(tmp_path / "x.pth")
    with pytest.raises(ModelFormatError):
        AudioSealDetector(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelFormatError, match="holds no weights of AudioSeal"):
        AudioSealDetector(tmp_path / "list.pth")


def test_without_the_package_the_extra_is_named(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"milonga\[watermark\]"):
        AudioSealWatermark(files[0])


def test_the_generation_service_marks_every_clip_with_its_models_digest(files: tuple[Path, Path]) -> None:
    model = resolve("mini")
    options: GenerationOptions = {
        "seed": 1,
        "num_inference_steps": 1,
        "duration": 0.64,
        "encoding": "float32",
    }
    clips = []
    for watermark in (None, files[0]):
        settings = load_settings(GenerationSettings, device="cpu", threads=1, watermark=watermark)
        with load_engine(settings, model) as engine:
            made = engine.generate(engine.request("rain", **options))
            clips.append(made.clips[0].waveform())
    plain_N, marked_N = clips
    expected_N = AudioSealWatermark(files[0]).embed(plain_N, 16_000, message_of(model.digest))
    np.testing.assert_allclose(marked_N, expected_N, atol=1e-6)


def test_generate_marks_clips_in_its_own_process_as_the_service_does(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.wav"
    options = ["-o", str(path), "--seed", "1", "--steps", "1", "--duration", "0.64", "-q"]
    clips = []
    for mark in ([], ["--watermark", str(files[0])]):
        assert cli.run(["generate", "rain", *options, *mark]) == 0
        clips.append(decode_audio(path.read_bytes(), "wav", 16_000)[0])
    plain_N, marked_N = clips
    expected_N = AudioSealWatermark(files[0]).embed(plain_N, 16_000, message_of(resolve("mini").digest))
    np.testing.assert_allclose(marked_N, expected_N, atol=2e-4)  # both were rounded to 16 bits
    assert not np.array_equal(marked_N, plain_N)
    capsys.readouterr()
    assert cli.run(["generate", "rain", *options, "--watermark", str(files[1])]) != 0
    assert "of another model than AudioSeal's" in capsys.readouterr().err
    assert cli.run(["generate", "rain", *options, *mark, "--server", "127.0.0.1:1"]) == 2
    assert "--watermark: is set by the service" in capsys.readouterr().err


def test_a_folder_of_marked_clips_is_not_completed_by_unmarked_ones(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, folder = tmp_path / "prompts.txt.jsonl", tmp_path / "clips"
    prompts.write_text('{"prompt": "rain"}\n')
    command = ["generate", "--prompts", str(prompts), "-o", str(folder), "--steps", "1", "--duration", "0.64"]
    assert cli.run([*command, "--watermark", str(files[0])]) == 0
    assert cli.run([*command, "--watermark", str(files[0])]) == 0
    capsys.readouterr()
    assert cli.run(command) == 2
    assert "now None" in capsys.readouterr().err


def test_verify_looks_for_a_watermark(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("c2pa")
    clip_N, path = _clip(0.5, 16_000), tmp_path / "clip.wav"
    path.write_bytes(encode_audio(clip_N, 16_000))
    found = AudioSealDetector(files[1]).detect(decode_audio(path.read_bytes(), "wav", 16_000)[0], 16_000)
    code = cli.run(["verify", str(path), "--watermark", str(files[1]), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["manifest"] is None
    assert shown["watermark"]["message"] == found.message
    assert code == (0 if found.marked else 2)


def test_the_harness_changes_clips_as_it_says() -> None:
    clip_N = _clip(2.0, RATE)
    for name, change in CHANGES.items():
        changed_N = change(clip_N)
        seconds = {"without the first 0.5 s": 1.5, "the middle second": 1.0}.get(name, 2.0)
        assert len(changed_N) == pytest.approx(seconds * RATE, abs=0.1 * RATE), name
        assert np.abs(changed_N).max() <= 1
    louder_N = np.multiply(clip_N, 1.1, dtype=np.float32)
    assert signal_to_noise(clip_N, louder_N) == pytest.approx(20, abs=1e-3)
    assert bits_right(Detection(share=1.0, message=0b1011), 0b0001) == BITS - 2
