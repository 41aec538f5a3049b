"""The GPU benchmark on a tiny model."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu


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
