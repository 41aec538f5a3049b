"""Clips that the mini captioner learns from: scenes, scenes after autoencoder and vocoder, generated clips.

    python -m training.mini.captioner_clips --work build/mini --rebuilt 256 --generated 128

Scenes are rendered when they are needed. The others cost more and are cached in shards; an existing shard is
not made again. A captioner that learnt from scenes alone would not know the traces of a vocoder.

Shape legend: N samples.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from services.models.latent import clip_generator
from services.models.mini import mini_folder
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from training.data.store import batches
from training.mini.latents import LONG, RELATIONS
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import SHORT, Event, draw_caption, make_scene
from training.soundworld.synthesis import CLASSES

SEED = 1_212
SHARD, BATCH = 64, 8
STEPS = 10
"""Denoising steps of a generated clip: fewer than by default, to save time."""
MODEL = "mini"
Kind = Literal["rebuilt", "generated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """A clip and the truth about it."""

    waveform_N: NDArray[np.float32]
    truth: CaptionTruth
    events: tuple[Event, ...] = ()
    """When the events sound; empty for a generated clip, where nobody knows."""


@functools.lru_cache(maxsize=1_536)
def scene_sound(seed: int, index: int, *, long: bool) -> Sound:
    """Render a scene of 2.56 or 5.12 s."""
    scene = make_scene(seed, index, LONG if long else SHORT)
    return Sound(waveform_N=scene.waveform, truth=scene.truth, events=scene.events)


def load_sounds(folder: Path, kind: Kind) -> list[Sound]:
    """Load the cached clips of one kind."""
    found: list[Sound] = []
    for path in sorted(folder.glob(f"{kind}-*.npz")):
        with np.load(path) as shard:
            columns = [shard[name] for name in ("waveforms", "classes", "relations", "spans")]
        found += map(_sound, *columns)
    return found


def make_shard(path: Path, kind: Kind, number: int, pipeline: TangoPipeline) -> None:
    """Make the clips of one shard; written under a temporary name, then renamed."""
    sounds: list[Sound] = []
    for numbers in batches(range(number * SHARD, (number + 1) * SHARD), BATCH):
        sounds += (_rebuilt if kind == "rebuilt" else _generated)(numbers, pipeline)
    rows = [[CLASSES.index(name) for name in sound.truth.classes] for sound in sounds]
    spans = [[(event.onset, event.offset) for event in sound.events] for sound in sounds]
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        waveforms=np.stack([np.clip(s.waveform_N, -1, 1) * 32767 for s in sounds]).astype(np.int16),
        classes=np.array([row + [-1] * (3 - len(row)) for row in rows]),
        relations=np.array([RELATIONS.index(sound.truth.relation) for sound in sounds]),
        spans=np.array([row + [(np.nan, np.nan)] * (3 - len(row)) for row in spans]),
    )
    temporary.replace(path)


def _sound(
    waveform_N: NDArray[np.int16], classes: NDArray[np.int64], relation: int, spans: NDArray[np.float64]
) -> Sound:
    names = [CLASSES[i] for i in classes if i >= 0]
    return Sound(
        waveform_N=(waveform_N / 32767).astype(np.float32),
        truth=CaptionTruth(classes=tuple(names), relation=RELATIONS[relation]),
        events=tuple(
            Event(event_class=name, onset=onset, offset=offset, level=0.0)
            for name, (onset, offset) in zip(names, spans.tolist(), strict=False)
            if np.isfinite(onset)
        ),
    )


@torch.inference_mode()
def _rebuilt(numbers: Sequence[int], pipeline: TangoPipeline) -> list[Sound]:
    """Return scenes after autoencoder and vocoder."""
    scenes = [make_scene(SEED, number, SHORT) for number in numbers]
    waveform_BN = torch.from_numpy(np.stack([scene.waveform for scene in scenes]))
    rebuilt_BN = pipeline.decode(pipeline.encode_audio(waveform_BN)).numpy()
    return [
        Sound(waveform_N=waveform_N, truth=scene.truth, events=scene.events)
        for waveform_N, scene in zip(rebuilt_BN, scenes, strict=True)
    ]


def _generated(numbers: Sequence[int], pipeline: TangoPipeline) -> list[Sound]:
    """Return clips generated from captions of the training split."""
    drawn = [draw_caption(np.random.default_rng([SEED, 1, number]), SHORT) for number in numbers]
    output = pipeline(
        [caption for caption, _ in drawn],
        num_inference_steps=STEPS,
        generator=[clip_generator(SEED, number) for number in numbers],
    )
    return [
        Sound(waveform_N=waveform_N, truth=truth)
        for waveform_N, (_, truth) in zip(output.audios, drawn, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--rebuilt", type=int, default=4 * SHARD)
    parser.add_argument("--generated", type=int, default=2 * SHARD)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.work / "captioner" / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load_tango(mini_folder(MODEL))
    pipeline.set_progress_bar_config(disable=True)
    jobs: list[tuple[Kind, int]] = [("rebuilt", n) for n in range(arguments.rebuilt // SHARD)]
    jobs += [("generated", n) for n in range(arguments.generated // SHARD)]
    for kind, number in tqdm(jobs, desc="clips", unit="shard"):
        path = folder / f"{kind}-{number:03d}.npz"
        if not path.exists():
            make_shard(path, kind, number, pipeline)


if __name__ == "__main__":
    main()
