"""The probe on YAMNet: its labels, thresholds and judgements; with YAMNet's file, its judgement of sounds.

Set MILONGA_YAMNET to the path of yamnet.tflite for the last tests.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from services.errors import InvalidInputError, ModelFormatError, ModelNotFoundError
from training.evaluation.probe import (
    Probe,
    RealScene,
    _threshold,
    fit_probe,
    judgement_metrics,
    load_probe,
    save_probe,
    window_labels,
)
from training.evaluation.yamnet import (
    CLASSES,
    DIMENSION,
    HOP,
    SAMPLING_RATE,
    Yamnet,
    YamnetOutput,
    load_yamnet,
)
from training.soundworld.captions import CaptionTruth, Relation
from training.soundworld.scenes import Event

A_THEN_B = CaptionTruth(classes=("a", "b"), relation="then")


def output(*windows: tuple[float, float]) -> YamnetOutput:
    """Return features whose first two values are given, one row per window."""
    embeddings_WD = np.zeros((len(windows), DIMENSION), dtype=np.float32)
    embeddings_WD[:, :2] = windows
    return YamnetOutput(embeddings_WD, np.zeros((len(windows), CLASSES), dtype=np.float32))


@pytest.fixture
def probe() -> Probe:
    """A probe whose classes a and b are the first two features: likely at 1, unlikely at 0."""
    weights_KD = np.zeros((2, DIMENSION))
    weights_KD[0, 0] = weights_KD[1, 1] = 8.0
    return Probe(
        classes=("a", "b"),
        mean_D=np.zeros(DIMENSION),
        scale_D=np.ones(DIMENSION),
        weights_KD=weights_KD,
        bias_K=np.full(2, -4.0),
        thresholds_K=np.full(2, 0.5),
        yamnet="",
    )


def event(name: str, onset: float, offset: float) -> Event:
    return Event(event_class=name, onset=onset, offset=offset, level=-20.0)


def test_a_window_has_the_events_that_cover_it() -> None:
    found = output((0, 0), (0, 0), (0, 0), (0, 0), (0, 0))
    assert found.times_W == pytest.approx([0.4875 + i * HOP / SAMPLING_RATE for i in range(5)])
    labels_WK = window_labels(found, [event("a", 0.0, 0.6), event("b", 1.0, 1.1)], ["a", "b"])
    # b, 0.1 s long, is in every window that has 40 % of it; the first window ends at 0.975 s.
    assert labels_WK.tolist() == [[True, False], [True, True], [False, True], [False, True], [False, True]]


def test_the_threshold_is_the_one_with_the_best_balanced_accuracy() -> None:
    best_S = np.array([0.1, 0.2, 0.8, 0.9, 0.95])
    assert _threshold(best_S, np.array([False, False, True, True, True])) == pytest.approx(0.5)
    assert _threshold(best_S, np.array([False, True, True, True, True])) == pytest.approx(0.15)
    assert _threshold(best_S, np.ones(5, dtype=bool)) == 0.5


def test_events_are_there_in_order_or_reversed(probe: Probe) -> None:
    in_order = probe.judge(output((1, 0), (0, 0), (0, 1)), A_THEN_B)
    assert (in_order.present, in_order.in_order, in_order.reversed) == (True, True, False)
    reversed_ = probe.judge(output((0, 1), (0, 0), (1, 0)), A_THEN_B)
    assert (reversed_.present, reversed_.in_order, reversed_.reversed) == (True, False, True)
    at_once = probe.judge(output((1, 1), (0, 0), (0, 0)), A_THEN_B)
    assert (at_once.present, at_once.in_order, at_once.reversed) == (True, False, False)
    missing = probe.judge(output((1, 0), (1, 0)), A_THEN_B)
    assert (missing.present, missing.in_order) == (False, None)
    assert missing.found == {"a": True, "b": False}
    other = probe.judge(output((1, 1)), CaptionTruth(classes=("a",), relation="single"))
    assert (other.present, other.in_order, other.others) == (True, None, 1)
    with pytest.raises(InvalidInputError, match="does not know 'c'; it knows a, b"):
        probe.judge(output((1, 1)), CaptionTruth(classes=("c",), relation="single"))


def test_metrics_are_shares(probe: Probe) -> None:
    outputs = [output((1, 0), (0, 1)), output((0, 1), (1, 0)), output((1, 0)), output((0, 1))]
    truths = [A_THEN_B, A_THEN_B, A_THEN_B, CaptionTruth(classes=("b",), relation="single")]
    found = judgement_metrics(map(probe.judge, outputs, truths), truths)
    assert found == pytest.approx(
        {
            "presence": 3 / 4,
            "event_presence": 6 / 7,
            "order_given_presence": 1 / 2,
            "reversed_given_presence": 1 / 2,
            "in_order": 1 / 3,
            "others": 0.0,
            "as_described": 1 / 2,
        }
    )


def test_a_file_that_holds_no_judge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judge.json"
    for content in ("", "[]", json.dumps({"format": 2}), json.dumps({"format": 1, "classes": ["a"]})):
        path.write_text(content)
        with pytest.raises(ModelFormatError, match="holds no judge"):
            load_probe(path, path)


@pytest.fixture(scope="module")
def yamnet_file() -> Path:
    path = os.environ.get("MILONGA_YAMNET")
    if path is None:
        pytest.skip("MILONGA_YAMNET is not set")
    pytest.importorskip("ai_edge_litert")
    return Path(path)


@pytest.fixture(scope="module")
def yamnet(yamnet_file: Path) -> Yamnet:
    return load_yamnet(yamnet_file)


def test_windows_cover_a_clip(yamnet: Yamnet) -> None:
    for seconds, windows in ((0.2, 1), (0.975, 1), (1.0, 2), (2.56, 8)):
        found = yamnet.windows(np.zeros(round(22_050 * seconds), dtype=np.float32), 22_050)
        assert found.embeddings_WD.shape == (windows, DIMENSION)
        assert found.logits_WK.shape == (windows, CLASSES)
        assert np.isfinite(found.logits_WK).all()


def test_a_fitted_probe_tells_a_tone_from_noise_and_their_order(
    yamnet: Yamnet, yamnet_file: Path, tmp_path: Path
) -> None:
    def scene(index: int) -> RealScene:
        rng = np.random.default_rng(index)
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(400, 900) * np.arange(16_000) / 16_000)
        noise = 0.1 * rng.standard_normal(16_000)
        first = bool(index % 2)
        halves = (tone, noise) if first else (noise, tone)
        names: tuple[str, ...] = ("tone", "noise") if first else ("noise", "tone")
        relation: Relation = "then"
        if index % 3 == 0:
            halves, names, relation = (halves[0], np.zeros(16_000)), names[:1], "single"
        events = tuple(event(name, float(i), i + 1.0) for i, name in enumerate(names))
        truth = CaptionTruth(classes=names, relation=relation)
        return RealScene(np.concatenate(halves).astype(np.float32), 16_000, truth, events)

    probe = fit_probe(yamnet, "", [scene(i) for i in range(24)], [scene(i) for i in range(24, 36)])
    save_probe(probe, tmp_path / "judge.json")
    with pytest.raises(ModelFormatError, match="another YAMNet"):
        load_probe(tmp_path / "judge.json", yamnet_file)
    held_out = [scene(i) for i in range(36, 48)]
    truths = [one.truth for one in held_out]
    judged = [probe.judge(yamnet.windows(one.waveform_N, one.sampling_rate), one.truth) for one in held_out]
    found = judgement_metrics(judged, truths)
    assert found["presence"] == found["order_given_presence"] == 1.0
    assert found["others"] == 0.0
    assert found["as_described"] == 1.0


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a file"):
        load_yamnet(tmp_path / "yamnet.tflite")
    pytest.importorskip("ai_edge_litert")
    (tmp_path / "yamnet.tflite").write_bytes(b"x" * 100)
    with pytest.raises(ModelFormatError, match="no TensorFlow Lite model"):
        load_yamnet(tmp_path / "yamnet.tflite")
