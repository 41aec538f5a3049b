"""The benchmarks of GPUs and of captioners on tiny models."""

import json
import queue
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import audiogenx, backends, captioning, gpu, latency, upstream, weights
from benchmarks.arrivals import batch_server
from services.models.manifest import write_manifest
from tests.tiny import tiny_audiogen, tiny_captioner, tiny_pipeline


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")  # diffusers'
def test_the_gpu_benchmark_measures_writes_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--output", str(output), "--only", "exact"])
    assert json.loads(output.read_text())["figures"]["exact"]["companions"]["equal_bits"] is True
    capsys.readouterr()

    measured = ["exact", "saturation", "peers", "cheaper steps"]
    gpu.main(["--tiny", "--output", str(output), "--only", *measured])
    printed = capsys.readouterr().out
    assert "exact:" not in printed
    figures = json.loads(output.read_text())["figures"]
    assert figures["saturation"]["4 rows"]["clips_per_second_2_steps"] > 0
    assert len(figures["peers"]) == 3  # two peers, and the mark of completeness
    cheaper = figures["cheaper steps"]
    assert "snr_db" not in cheaper["bfloat16, 2 rows"], "it is the reference"
    assert cheaper["deep features reused, 2 rows"]["snr_db"] > 0
    assert cheaper["fp8 linear layers"]["skipped"] == "torchao is not installed"
    page = output.with_suffix(".md").read_text()
    assert "## Saturation" in page
    assert "| 4 rows |" in page


def test_weights_are_counted_by_part_and_format(tmp_path: Path) -> None:
    weights.main(["--tiny", "--output", str(tmp_path / "weights.json")])
    rows = json.loads((tmp_path / "weights.json").read_text())["GiB"]
    assert list(rows) == ["text_encoder", "unet", "vae", "vocoder", "all"]
    layer = nn.Sequential(nn.Linear(3, 5), nn.Conv1d(5, 2, 1))
    assert sum(weights.bytes_of(layer, 4).values()) == 4 * (15 + 5 + 10 + 2)
    assert weights.bytes_of(layer, 2, int8=True) == {"0": 15 + 4 * 5 + 2 * 5, "1": 2 * (10 + 2)}


@pytest.mark.parametrize(
    ("backend", "package", "error"),
    [
        ("torch, bfloat16", "torch", 0.1),
        ("ONNX Runtime", "onnxruntime", 1e-4),
        ("OpenVINO", "openvino", 1e-4),
        ("OpenVINO, bfloat16", "openvino", 0.3),
    ],
)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # torch's
def test_backends_compute_what_torch_does(tmp_path: Path, backend: str, package: str, error: float) -> None:
    pytest.importorskip(package)
    subject = backends.tiny()
    figures = backends.measured(subject, 2, [backend], rounds=1)[backend]
    assert 0 < figures["largest error"] < error
    assert figures["equal bits"]
    assert figures["times faster"] > 0


def test_a_backend_that_is_not_installed_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = backends.Backend(build=backends.in_torch, package="no_such_package")
    monkeypatch.setattr(backends, "BACKENDS", {"lacking": lacking, **backends.BACKENDS})
    output = tmp_path / "backends.json"
    words = ["--tiny", "--rounds", "1", "--only", "full size", "--output", str(output), "--backends"]
    backends.main([*words, "lacking"])
    backends.main([*words, "torch, bfloat16"])
    rows = json.loads(output.read_text())["full size"]["2 rows"]
    assert rows["lacking"] == {"skipped": "no_such_package is not installed"}
    assert rows["torch, bfloat16"]["snr_db"] > 20, "what the report has is kept"


def test_upstreams_way_is_the_pipelines_with_its_scheduler() -> None:
    pipeline = tiny_pipeline(text_length=None)
    ours = pipeline(
        "a dog barks",
        scheduler="ddpm",
        num_inference_steps=4,
        guidance_scale=upstream.GUIDANCE,
        generator=torch.Generator().manual_seed(1),
    )
    theirs = upstream.upstream_clip(pipeline, "a dog barks", 4, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(theirs.numpy(), ours.audios, atol=1e-5)


def test_upstreams_way_is_compared_with_the_profiles(tmp_path: Path) -> None:
    output = tmp_path / "upstream.json"
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    write_manifest(tmp_path / "tiny", name="tiny", version="1", license="Apache-2.0")
    words = ["--tiny", "--only", "full size", "--rounds", "1", "--threads", "1", "--output", str(output)]
    upstream.main([*words, "--profiles", f"file:{tmp_path / 'tiny'}"])
    report = json.loads(output.read_text())["full size"]
    parts = {name: cost["processor"] for name, cost in report["parts"].items()}
    first, quality, draft = report["clips"].values()
    assert (first["denoiser rows"], quality["denoiser rows"], draft["denoiser rows"]) == (400, 12, 2)
    expected = parts["bfloat16: text"] + 2 * parts["bfloat16: a step of 1 rows"] + parts["bfloat16: decoding"]
    assert draft["processor seconds per clip"] == pytest.approx(expected, abs=1e-4)
    assert first["times faster"] == 1 < draft["times faster"]


def test_latency_under_load_is_measured_by_policy_and_kind(tmp_path: Path) -> None:
    report: dict[str, Any] = {"points": {}, "capacity": 20.0}
    bench = latency.Bench(tiny_pipeline())
    done = list(latency.measure(bench, report, latency.POLICIES, [0.5], 1.5))
    assert done == [f"{policy}, load 0.5" for policy in latency.POLICIES]
    assert not list(latency.measure(bench, report, latency.POLICIES, [0.5], 1.5)), "the points are there"
    for points in report["points"].values():
        kinds = points["0.5"]
        assert kinds["draft"]["requests"] + kinds["long render"]["requests"] == 15
        assert 0 < kinds["draft"]["p50"] <= kinds["draft"]["p95"] <= kinds["draft"]["max"]
    assert latency.plot(report).startswith(b"\x89PNG")
    assert bench.capacity(burst=4) > 0


def test_requests_of_one_kind_that_wait_are_rendered_together() -> None:
    batches: list[list[int]] = []
    started, free = threading.Event(), threading.Event()

    def render(indices: Sequence[int]) -> None:
        batches.append(list(indices))
        started.set()
        free.wait(60)

    submit, close = batch_server(render, 2, kind_of=lambda index: index % 2)
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    submit(0, partial(done.put, 0))
    assert started.wait(60)
    for index in (2, 3, 4, 6, 5):
        submit(index, partial(done.put, index))
    free.set()
    close()
    assert batches == [[0], [2, 4], [3, 5], [6]]
    assert [done.get() for _ in range(6)] == [0, 2, 4, 3, 5, 6]


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


def test_the_benchmark_of_audiogenx_measures_each_form(tmp_path: Path) -> None:
    tiny_audiogen().save_pretrained(tmp_path / "tiny")
    found = {}
    for name, words in (
        ("whole", ["--model", f"file:{tmp_path / 'tiny'}"]),
        ("generators", ["--steps", "5", "--width", "8"]),
    ):
        output = tmp_path / f"{name}.json"
        audiogenx.main([*words, "--tokens", "3", "--iterations", "1", "--output", str(output)])
        found[name] = json.loads(output.read_text())["an iteration"]
    assert [len(forms) for forms in found.values()] == [3, 2]
    assert all(one["cpu_seconds"] > 0 for forms in found.values() for one in forms.values())
