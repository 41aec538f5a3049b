"""A judge of a data set's own classes: a linear probe on YAMNet's features, calibrated on real scenes.

    probe = fit_probe(yamnet, digest, scenes, calibration)
    probe.judge(yamnet.windows(waveform_N, 22_050), truth)

Zero-shot classes of AudioSet recognise recorded scenes poorly. The probe learns from scenes of recordings
which events are in a window. It is judged on scenes of other recordings: that accuracy is the ceiling of
every figure that it gives.

An event is present if its class exceeds its threshold in any window. Two events are in order if the moments
when they are likeliest are.

Shape legend: S scenes, N samples, W windows, D features, K classes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.errors import ModelFormatError, invalid
from services.files import sha256_of, write_atomically
from training.evaluation.yamnet import DIMENSION, SAMPLING_RATE, WINDOW, Yamnet, YamnetOutput
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import Event

COVERED: Final = 0.4
"""An event is in a window if it covers this share of it, or of the event."""
SHARPNESS: Final = 4.0
"""Exponent of the probabilities by which the moment of an event is averaged."""
TIE_SECONDS: Final = 0.05
"""Events whose moments are closer than this are in no order."""
FORMAT: Final = 1
REGULARISATION: Final = 0.1
"""Inverse strength of the probe's L2 penalty, on standardised features."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RealScene:
    """A scene of recordings: its sound and the times of its events."""

    waveform_N: NDArray[np.float32]
    sampling_rate: int
    """Hertz."""
    truth: CaptionTruth
    events: tuple[Event, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneJudgement:
    """What the judge found of a prompt's events in a clip."""

    present: bool
    """Whether all events are there."""
    in_order: bool | None
    """Whether they are in the prompt's order; None if it has none or an event is missing."""
    reversed: bool | None
    """Whether they are in the reverse order; None as above."""
    found: Mapping[str, bool]
    """Whether each event of the prompt is there."""
    others: int
    """Number of classes that are there and not in the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """Linear classifiers of windows, one for each class, and their thresholds."""

    classes: tuple[str, ...]
    mean_D: Matrix
    scale_D: Matrix
    weights_KD: Matrix
    bias_K: Matrix
    thresholds_K: Matrix
    """Probability in the best window from which a class is present."""
    yamnet: str
    """SHA-256 in hex of YAMNet's file."""

    def probabilities(self, output: YamnetOutput) -> Matrix:
        """Return the probability of each class in each window, [W, K]."""
        features_WD = (output.embeddings_WD - self.mean_D) / self.scale_D
        logits_WK: Matrix = features_WD @ self.weights_KD.T + self.bias_K
        return 1 / (1 + np.exp(-logits_WK))

    def judge(self, output: YamnetOutput, truth: CaptionTruth) -> SceneJudgement:
        """Compare a clip with the events of its prompt. Raises `InvalidInputError` for an unknown class."""
        if unknown := [name for name in truth.classes if name not in self.classes]:
            raise invalid("judge", f"does not know {unknown[0]!r}; it knows {', '.join(self.classes)}")
        probabilities_WK = self.probabilities(output)
        there_K = probabilities_WK.max(axis=0) >= self.thresholds_K
        rows = [self.classes.index(name) for name in truth.classes]
        present = bool(there_K[rows].all())
        in_order = reversed_ = None
        if present and truth.relation == "then":
            moments = np.array([_moment(output.times_W, probabilities_WK[:, row]) for row in rows])
            in_order = bool((np.diff(moments) > TIE_SECONDS).all())
            reversed_ = bool((np.diff(moments) < -TIE_SECONDS).all())
        return SceneJudgement(
            present=present,
            in_order=in_order,
            reversed=reversed_,
            found={name: bool(there_K[row]) for name, row in zip(truth.classes, rows, strict=True)},
            others=int(there_K.sum() - there_K[rows].sum()),
        )


def fit_probe(
    yamnet: Yamnet, digest: str, fitting: Sequence[RealScene], calibration: Sequence[RealScene]
) -> Probe:
    """Fit a probe on scenes, and its thresholds on scenes of other recordings.

    Each threshold is the one with the highest balanced accuracy on the calibration scenes.

    Args:
        yamnet: the model of the features.
        digest: SHA-256 in hex of its file.
        fitting: scenes that the classifiers learn from.
        calibration: scenes that the thresholds are chosen on.

    Raises `InvalidInputError` if a class has no scene, or only one class has any.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    classes = tuple(sorted({event.event_class for scene in fitting for event in scene.events}))
    if len(classes) < 2:
        raise invalid("data", f"has scenes of {len(classes)} class; a judge needs two or more")
    outputs = [yamnet.windows(scene.waveform_N, scene.sampling_rate) for scene in fitting]
    features_WD = np.concatenate([output.embeddings_WD for output in outputs]).astype(np.float64)
    labels_WK = np.concatenate(
        [window_labels(output, scene.events, classes) for output, scene in zip(outputs, fitting, strict=True)]
    )
    if absent := [
        name for name, column in zip(classes, labels_WK.T, strict=True) if not 0 < column.mean() < 1
    ]:
        raise invalid("data", f"has {absent[0]!r} in all windows or in none; add recordings, or more scenes")
    mean_D, scale_D = features_WD.mean(axis=0), features_WD.std(axis=0) + 1e-3
    standard_WD = (features_WD - mean_D) / scale_D
    fitted = [
        LogisticRegression(C=REGULARISATION, max_iter=300, class_weight="balanced").fit(standard_WD, column)
        for column in labels_WK.T
    ]
    probe = Probe(
        classes=classes,
        mean_D=mean_D,
        scale_D=scale_D,
        weights_KD=np.concatenate([one.coef_ for one in fitted]),
        bias_K=np.concatenate([one.intercept_ for one in fitted]),
        thresholds_K=np.full(len(classes), 0.5),
        yamnet=digest,
    )
    best_SK = np.stack(
        [
            probe.probabilities(yamnet.windows(scene.waveform_N, scene.sampling_rate)).max(axis=0)
            for scene in calibration
        ]
    )
    truth_SK = np.array([[name in scene.truth.classes for name in classes] for scene in calibration])
    thresholds = [_threshold(best, there) for best, there in zip(best_SK.T, truth_SK.T, strict=True)]
    return Probe(
        **{name: getattr(probe, name) for name in Probe.__slots__ if name != "thresholds_K"},
        thresholds_K=np.array(thresholds),
    )


def window_labels(output: YamnetOutput, events: Sequence[Event], classes: Sequence[str]) -> NDArray[np.bool_]:
    """Return which classes are in each window, [W, K]."""
    half = WINDOW / SAMPLING_RATE / 2
    labels_WK = np.zeros((len(output.times_W), len(classes)), dtype=bool)
    for event in events:
        overlap_W = np.minimum(output.times_W + half, event.offset) - np.maximum(
            output.times_W - half, event.onset
        )
        shorter = min(2 * half, event.offset - event.onset)
        labels_WK[:, classes.index(event.event_class)] |= overlap_W >= COVERED * shorter
    return labels_WK


def judgement_metrics(
    judgements: Iterable[SceneJudgement], truths: Iterable[CaptionTruth]
) -> dict[str, float]:
    """Return shares over clips; NaN where no clip counts.

    ``presence``: all events; ``event_presence``: of single events; ``order_given_presence`` and
    ``reversed_given_presence``: of sequences whose events are there; ``in_order``: sequences with both;
    ``others``: mean number of further classes; ``as_described``: all events, not in another order, and no
    further class. Noise may have every class, so presence alone says little.
    """
    pairs = list(zip(judgements, truths, strict=True))
    sequences = [one for one, truth in pairs if truth.relation == "then"]
    ordered = [one for one in sequences if one.in_order is not None]
    events = [there for one, _ in pairs for there in one.found.values()]

    def mean(values: Sequence[object]) -> float:
        return float(np.mean([float(bool(value)) for value in values])) if values else float("nan")

    return {
        "presence": mean([one.present for one, _ in pairs]),
        "event_presence": mean(events),
        "order_given_presence": mean([one.in_order for one in ordered]),
        "reversed_given_presence": mean([one.reversed for one in ordered]),
        "in_order": mean([one.in_order for one in sequences]),
        "others": float(np.mean([one.others for one, _ in pairs])) if pairs else float("nan"),
        "as_described": mean(
            [one.present and one.in_order is not False and not one.others for one, _ in pairs]
        ),
    }


def save_probe(probe: Probe, path: Path) -> None:
    """Write a probe as JSON. Raises `OutputError`."""
    content: dict[str, Any] = {"format": FORMAT, "classes": list(probe.classes), "yamnet": probe.yamnet}
    for name in ("mean_D", "scale_D", "weights_KD", "bias_K", "thresholds_K"):
        content[name] = np.round(getattr(probe, name), 6).tolist()
    write_atomically(path, json.dumps(content) + "\n")


def load_probe(path: Path, yamnet: Path) -> Probe:
    """Read a probe. Raises `ModelFormatError` unless it is one, and of this file of YAMNet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this release reads {FORMAT}")
        arrays = {
            name: np.array(content[name], dtype=np.float64)
            for name in ("mean_D", "scale_D", "weights_KD", "bias_K", "thresholds_K")
        }
        probe = Probe(classes=tuple(content["classes"]), yamnet=str(content["yamnet"]), **arrays)
        if probe.weights_KD.shape != (len(probe.classes), DIMENSION):
            raise ValueError("the weights have another shape")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFormatError(
            f"{path} holds no judge: {error}; make one by `milonga train judge`"
        ) from error
    if probe.yamnet != sha256_of(yamnet):
        raise ModelFormatError(f"{path} was fitted on another YAMNet than {yamnet}; give that file")
    return probe


def _moment(times_W: NDArray[np.float32], probabilities_W: Matrix) -> float:
    weights_W = probabilities_W**SHARPNESS
    return float((times_W * weights_W).sum() / weights_W.sum().clip(1e-12))


def _threshold(best_S: Matrix, there_S: NDArray[np.bool_]) -> float:
    """Return the threshold with the highest balanced accuracy; 0.5 if the class is in all scenes or none."""
    if there_S.all() or not there_S.any():
        return 0.5
    values = np.unique(best_S)
    candidates = (values[1:] + values[:-1]) / 2
    accuracy = [((best_S >= c)[there_S].mean() + (best_S < c)[~there_S].mean()) / 2 for c in candidates]
    return float(candidates[int(np.argmax(accuracy))]) if len(candidates) else 0.5
