"""The second judge: a multilayer perceptron on patches of a spectrogram, trained apart from the tagger.

The tagger is a convolutional recurrent network on log-mel frames, in torch. This one shares neither code nor
features with it: power in log-spaced bands, half a second at a time without memory, scikit-learn. It has its
own scenes of the sound world, disturbed by gain, noise and equalisation, so that it does not depend on the
exact levels that a vocoder may miss. Where both agree, a figure is not one judge's habit.

Shape legend: N samples, F frames, M bands, P patches, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import Event, SceneConfig, make_scene
from training.soundworld.synthesis import CLASSES, SAMPLING_RATE

Array = NDArray[np.float32]

WORLD: Final = 92_003
"""Seed of its scenes, which nothing else uses."""
WINDOW, HOP = 512, 320
"""Samples of a frame, and between two: 32 ms every 20 ms."""
BANDS: Final = 40
FRAMES, STRIDE = 24, 4
"""Frames of a patch, and between two patches: 0.48 s every 0.08 s."""
PATCH_SECONDS: Final = STRIDE * HOP / SAMPLING_RATE
MINIMUM_SECONDS: Final = 0.2
"""A class is present if it is detected for so long in all."""
TIE_SECONDS: Final = 0.1
"""Events whose centres are closer are neither in order nor reversed."""
PATCHES: Final = 12
"""Random patches of each scene that it learns from."""


@dataclass(frozen=True, slots=True)
class Judge:
    """The trained judge."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    mean_M: Array
    scale_M: Array

    def detect(self, waveform_N: Array) -> dict[str, NDArray[np.bool_]]:
        """Return by class in which patches it sounds [P], of those that sound for `MINIMUM_SECONDS`."""
        hidden = self._standardised(spectrogram(waveform_N))
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = np.maximum(hidden @ weight + bias, 0.0)
        logits_PK = hidden @ self.weights[-1] + self.biases[-1]
        active_PK = logits_PK > 0
        least = round(MINIMUM_SECONDS / PATCH_SECONDS)
        return {
            name: active_PK[:, k] for k, name in enumerate(CLASSES) if int(active_PK[:, k].sum()) >= least
        }

    def figures(
        self, truth: CaptionTruth, waveform_N: Array, sampling_rate: int = SAMPLING_RATE
    ) -> dict[str, float]:
        """Return the figures of a clip by the events of its prompt; NaN where undefined."""
        assert sampling_rate == SAMPLING_RATE
        found = self.detect(waveform_N)
        present = all(name in found for name in truth.classes)
        order = together = float("nan")
        if present and truth.relation == "then":
            centres = [float(np.flatnonzero(found[name]).mean()) * PATCH_SECONDS for name in truth.classes]
            order = float((np.diff(centres) > TIE_SECONDS).all())
        if present and truth.relation == "while":
            both_P = np.logical_and.reduce([found[name] for name in truth.classes])
            together = float(both_P.sum() >= 0.5 * min(found[name].sum() for name in truth.classes))
        return {
            "second.presence": float(present),
            "second.order_given_presence": order,
            "second.present_and_in_order": float(present and order != 0.0),
            "second.simultaneous_given_presence": together,
        }

    def _standardised(self, bands_FM: Array) -> Array:
        return patches((bands_FM - self.mean_M) / self.scale_M)


def spectrogram(waveform_N: Array) -> Array:
    """Return the logarithm of the power in each band and frame [F, M]."""
    padded = np.pad(waveform_N.astype(np.float32), (WINDOW // 2, WINDOW))
    frames_FW = sliding_window_view(padded, WINDOW)[::HOP] * np.hanning(WINDOW).astype(np.float32)
    power_FB = np.square(np.abs(np.fft.rfft(frames_FW, axis=1)), dtype=np.float32)
    return np.log10(power_FB @ _filters() + 1e-5).astype(np.float32)


def patches(bands_FM: Array) -> Array:
    """Return windows of `FRAMES` frames, flattened [P, FRAMES * M]; the ends are padded by the edges."""
    padded = np.pad(bands_FM, ((FRAMES // 2, FRAMES // 2), (0, 0)), mode="edge")
    windows = sliding_window_view(padded, FRAMES, axis=0)[::STRIDE]  # [P, M, FRAMES]
    return windows.reshape(len(windows), -1).astype(np.float32)


def load_judge(folder: Path, clips: int) -> Judge:
    """Return the judge of `folder`; train it first on `clips` scenes if it is not there."""
    path = folder / f"judge-{clips}.npz"
    if not path.exists():
        judge = train_judge(clips)
        arrays: dict[str, Any] = {f"weight{i}": w for i, w in enumerate(judge.weights)}
        arrays |= {f"bias{i}": b for i, b in enumerate(judge.biases)}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "part.npz"
        np.savez(temporary, mean=judge.mean_M, scale=judge.scale_M, **arrays)
        temporary.replace(path)
    with np.load(path) as stored:
        layers = range(sum(name.startswith("weight") for name in stored.files))
        return Judge(
            weights=tuple(stored[f"weight{i}"] for i in layers),
            biases=tuple(stored[f"bias{i}"] for i in layers),
            mean_M=stored["mean"],
            scale_M=stored["scale"],
        )


def train_judge(clips: int) -> Judge:
    """Train on the first `clips` scenes of `WORLD`. The same number gives the same judge."""
    from sklearn.neural_network import MLPClassifier  # type: ignore[import-untyped]

    scenes = SceneConfig(single=0.2, sequence=0.4)
    inputs, labels = [], []
    for index in range(clips):
        scene = make_scene(WORLD, index, scenes)
        rng = np.random.default_rng([WORLD, index, 1])
        bands_FM = spectrogram(disturbed(scene.waveform, rng)) + rng.normal(0, 0.15, BANDS).astype(np.float32)
        found_PK = activity(scene.events, len(bands_FM))
        picked = rng.choice(len(found_PK), min(PATCHES, len(found_PK)), replace=False)
        inputs.append(patches(bands_FM)[picked].astype(np.float16))
        labels.append(found_PK[picked])
    inputs_PX = np.concatenate(inputs)
    bands_PM = inputs_PX.reshape(len(inputs_PX), BANDS, FRAMES).astype(np.float32)
    mean_M, scale_M = bands_PM.mean((0, 2)), bands_PM.std((0, 2)) + 1e-3
    standard_PX = ((bands_PM - mean_M[:, None]) / scale_M[:, None]).reshape(inputs_PX.shape)
    network = MLPClassifier((256, 96), alpha=1e-3, batch_size=256, max_iter=14, random_state=0, tol=0.0)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the number of passes is fixed
        network.fit(standard_PX, np.concatenate(labels))
    return Judge(
        weights=tuple(w.astype(np.float32) for w in network.coefs_),
        biases=tuple(b.astype(np.float32) for b in network.intercepts_),
        mean_M=mean_M,
        scale_M=scale_M,
    )


def disturbed(waveform_N: Array, rng: np.random.Generator) -> Array:
    """Return a clip with another gain and more noise."""
    gain, floor = 10 ** (rng.uniform(-8, 4) / 20), 10 ** (rng.uniform(-75, -48) / 20)
    noise_N = rng.standard_normal(len(waveform_N))
    return np.clip(waveform_N * gain + noise_N * floor, -1.0, 1.0).astype(np.float32)


def activity(events: Sequence[Event], frames: int) -> NDArray[np.int8]:
    """Return which classes sound at the centre of each patch [P, K]."""
    times_P = (np.arange(0, frames + 1, STRIDE) * HOP) / SAMPLING_RATE
    found_PK = np.zeros((len(times_P), len(CLASSES)), dtype=np.int8)
    for event in events:
        inside_P = (times_P >= event.onset) & (times_P <= event.offset)
        found_PK[inside_P, CLASSES.index(event.event_class)] = 1
    return found_PK


def check_judge(judge: Judge, clips: int) -> Mapping[str, float]:
    """Return how often the judge is right on scenes of the validation split, which it did not learn from."""
    scenes = SceneConfig(single=0.0, sequence=0.6, split="validation")
    rows = []
    for index in range(clips):
        scene = make_scene(WORLD + 1, index, scenes)
        rows.append(judge.figures(scene.truth, scene.waveform))
        others = float(set(judge.detect(scene.waveform)) <= set(scene.truth.classes))
        rows[-1]["second.nothing_else"] = others
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


def _filters() -> Array:
    """Return triangular filters in log-spaced bands from 60 Hz to 7.6 kHz [WINDOW // 2 + 1, M]."""
    edges = np.geomspace(60.0, 7_600.0, BANDS + 2)
    hertz = np.fft.rfftfreq(WINDOW, 1 / SAMPLING_RATE)[:, None]
    # No band is narrower than a bin.
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    width = SAMPLING_RATE / WINDOW
    rising = (hertz - np.minimum(low, centre - width)) / np.maximum(centre - low, width)
    falling = (np.maximum(high, centre + width) - hertz) / np.maximum(high - centre, width)
    return np.clip(np.minimum(rising, falling), 0.0, None).astype(np.float32)
