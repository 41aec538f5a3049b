"""The benchmarks of GPUs and of captioners on tiny models."""

import json
from pathlib import Path

import pytest

from benchmarks import captioning, gpu
from tests.tiny import tiny_captioner


def test_the_gpu_benchmark_measures_writes_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--output", str(output), "--only", "exact"])
    assert json.loads(output.read_text())["figures"]["exact"]["companions"]["equal_bits"] is True
    capsys.readouterr()

    gpu.main(["--tiny", "--output", str(output), "--only", "exact", "saturation"])
    printed = capsys.readouterr().out
    assert "exact:" not in printed
    figures = json.loads(output.read_text())["figures"]
    assert figures["saturation"]["4 rows"]["clips_per_second_2_steps"] > 0
    page = output.with_suffix(".md").read_text()
    assert "## Saturation" in page
    assert "| 4 rows |" in page


def test_the_benchmark_of_captioners_measures_each_comparison(tmp_path: Path) -> None:
    tiny_captioner().save_pretrained(tmp_path / "tiny")
    words = [
        *("--beams", "2", "3"),
        "--model",
        f"file:{tmp_path / 'tiny'}",
        "--clips",
        "2",
        "--tokens",
        "3",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    report = captioning.measure(captioning.parse(words))
    shares = report["stages"]
    assert shares["encode"] + shares["prefill"] + shares["decode"] == pytest.approx(1.0)
    assert report["beam_sizes"]["beams"] == [2, 3]
    assert report["batching"]["batched_captions_a_second"] > 0
    assert report["memory_mib"]["loaded"] > 0
    assert report["parameters_millions"]["language_model"] == 0.01
