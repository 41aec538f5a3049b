"""Examine a generator of recorded sounds on scenes of held-out recordings, stage by stage.

The same scenes are judged as they are (the ceiling), through spectrogram and vocoder, through the autoencoder
too, and as the generator makes them from their captions. So a poor figure shows which part it comes from.

Shape legend: N samples, S scenes, D embedding width, T mel frames, M mel bins.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.files import sha256_of
from services.models.latent import clip_generator
from services.models.mel import mel_frames
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from training.data.recorded_scenes import RecordedScene, RecordedSceneConfig, RecordedScenes
from training.data.recordings import Recording
from training.data.splits import NONE, SplitConfig, split_recordings
from training.evaluation.distances import (
    KAD_SCALE,
    Gaussian,
    frechet_distance,
    gaussian_kernel,
    median_bandwidth,
    squared_mmd,
)
from training.evaluation.probe import Probe, RealScene, fit_probe, judgement_metrics
from training.evaluation.yamnet import Yamnet
from training.loop.progress import progress

FITTING: Final = 1_000
"""Scenes that a judge learns from."""
CALIBRATION: Final = 300
"""Scenes that its thresholds are chosen on."""
BATCH: Final = 8
STAGES: Final = ("real", "vocoder", "autoencoder", "generated")

Waveforms = list[NDArray[np.float32]]


def make_judge(
    yamnet: Yamnet,
    path: Path,
    recordings: Sequence[Recording],
    config: RecordedSceneConfig,
    *,
    fitting: int = FITTING,
    calibration: int = CALIBRATION,
) -> Probe:
    """Return a judge of the classes of `recordings`, a quarter of which calibrate its thresholds.

    `path` is YAMNet's file. Raises `InvalidInputError` if the recordings are too few.
    """
    parts = split_recordings(recordings, SplitConfig(folds=(NONE,), held_out=0.25))
    sets = ((parts.train, 2, fitting, "judge"), (parts.held_out, 3, calibration, "calibration"))
    learning, checking = (
        real_scenes(RecordedScenes(part, _other(config, shift)), count, title)
        for part, shift, count, title in sets
    )
    return fit_probe(yamnet, sha256_of(path), learning, checking)


def real_scenes(scenes: RecordedScenes, count: int, title: str) -> list[RealScene]:
    """Return the first `count` scenes, mixed. Raises OSError or ValueError if a recording can't be read."""
    return [mixed(scenes.scene(index)) for index in _shown(count, title)]


def mixed(scene: RecordedScene) -> RealScene:
    """Return a scene's sound with the times of its events."""
    waveform_N, events = scene.clip.render()
    return RealScene(waveform_N, scene.clip.sampling_rate, scene.truth, events)


def examine(
    folder: Path,
    scenes: RecordedScenes,
    count: int,
    yamnet: Yamnet,
    probe: Probe,
    stages: Sequence[str] = STAGES,
) -> dict[str, Any]:
    """Return the figures of each stage (`judgement_metrics`, FAD and KAD to the real scenes).

    Args:
        folder: of the generator.
        scenes: of held-out recordings.
        count: number of scenes.
        yamnet: the features.
        probe: the judge.
        stages: of `STAGES`, in order; ``real`` is always there.
    """
    pipeline = load_tango(folder)
    rate = pipeline.geometry.sampling_rate
    drawn = [scenes.scene(index) for index in range(count)]
    real: Waveforms = [scene.clip.render()[0] for scene in drawn]
    makers: Mapping[str, Callable[[Sequence[int]], Waveforms]] = {
        "real": lambda rows: [real[row] for row in rows],
        "vocoder": lambda rows: _vocoded(pipeline, [real[row] for row in rows]),
        "autoencoder": lambda rows: _reencoded(pipeline, [real[row] for row in rows]),
        "generated": lambda rows: _generated(pipeline, [drawn[row].caption for row in rows], rows),
    }
    found: dict[str, Any] = {}
    truths = [scene.truth for scene in drawn]
    reference_SD: NDArray[np.float64] | None = None
    for stage in dict.fromkeys(("real", *stages)):
        outputs = []
        for rows in _batches(count, stage):
            outputs += [yamnet.windows(waveform, rate) for waveform in makers[stage](rows)]
        embeddings_SD = np.stack([one.embeddings_WD.mean(axis=0) for one in outputs]).astype(np.float64)
        judgements = [probe.judge(one, truth) for one, truth in zip(outputs, truths, strict=True)]
        figures = judgement_metrics(judgements, truths)
        if reference_SD is None:
            reference_SD = embeddings_SD
        else:
            figures |= _distances(embeddings_SD, reference_SD)
        found[stage] = {name: value for name, value in figures.items() if np.isfinite(value)}
    return {"scenes": count, "stages": found, "retained": retained(found)}


def retained(stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the share as described of each stage, divided by that of the stage before it."""
    names = [name for name in STAGES if name in stages]
    return {
        name: stages[name]["as_described"] / stages[before]["as_described"]
        for before, name in itertools.pairwise(names)
        if stages[before]["as_described"]
    }


def _distances(embeddings_SD: NDArray[np.float64], reference_SD: NDArray[np.float64]) -> dict[str, float]:
    """Return the Fréchet distance and KAD of clips to references."""
    bandwidth = median_bandwidth(reference_SD)

    def kernel(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        return gaussian_kernel(one, other, bandwidth)

    mmd = squared_mmd(
        kernel(embeddings_SD, embeddings_SD),
        kernel(reference_SD, reference_SD),
        kernel(embeddings_SD, reference_SD),
        # Row by row the two sets are of one scene.
        groups_N=np.arange(len(embeddings_SD)),
        groups_M=np.arange(len(reference_SD)),
    )
    return {
        "fad": frechet_distance(Gaussian.fit(embeddings_SD), Gaussian.fit(reference_SD)),
        "kad": KAD_SCALE * mmd,
    }


def _padded(pipeline: TangoPipeline, waveforms: Waveforms) -> torch.Tensor:
    """Return waveforms [B, N] padded to whole blocks of latents."""
    geometry = pipeline.geometry
    longest = max(map(len, waveforms))
    samples = pipeline.latent_samples(longest / geometry.sampling_rate)
    return torch.from_numpy(np.stack([np.pad(one, (0, samples - len(one))) for one in waveforms]))


@torch.no_grad()
def _vocoded(pipeline: TangoPipeline, waveforms: Waveforms) -> Waveforms:
    mel_BTM = mel_frames(_padded(pipeline, waveforms), pipeline.log_mel())[:, 0]
    return _cut(pipeline.vocoder(mel_BTM), waveforms)


def _reencoded(pipeline: TangoPipeline, waveforms: Waveforms) -> Waveforms:
    return _cut(pipeline.decode(pipeline.encode_audio(_padded(pipeline, waveforms))), waveforms)


def _generated(pipeline: TangoPipeline, captions: Sequence[str], rows: Sequence[int]) -> Waveforms:
    found = pipeline(list(captions), generator=[clip_generator(row) for row in rows])
    return list(np.asarray(found.audios, dtype=np.float32))


def _cut(waveform_BN: torch.Tensor, like: Waveforms) -> Waveforms:
    rows = waveform_BN.float().cpu().numpy()
    return [row[: len(one)] for row, one in zip(rows, like, strict=True)]


def _other(config: RecordedSceneConfig, shift: int) -> RecordedSceneConfig:
    """Return the config of other scenes."""
    return replace(config, seed=config.seed + shift)


def _shown(count: int, title: str) -> Iterator[int]:
    with progress(total=count, desc=title, unit="scene") as bar:
        for index in range(count):
            yield index
            bar.update()


def _batches(count: int, title: str) -> Iterator[list[int]]:
    with progress(total=count, desc=title, unit="clip") as bar:
        for first in range(0, count, BATCH):
            rows = list(range(first, min(count, first + BATCH)))
            yield rows
            bar.update(len(rows))
