"""Render scenes once and cache their latents, so that the denoisers' trainings need no synthesis.

    python -m training.mini.latents --work build/mini --scenes 32768

Shards of float16 latents [B, C, T, F] with the truth of each scene; every training step writes new captions.
An existing shard is not made again.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from services.models.mel import LogMel, mel_frames
from training.soundworld.captions import CaptionTruth, Relation
from training.soundworld.scenes import SHORT, Scene, SceneConfig, make_scene
from training.soundworld.synthesis import CLASSES

SEED = 404
SHARD = 2_048
LONG = SceneConfig(duration=5.12, single=0.15, sequence=0.6, three=0.35)
RELATIONS: tuple[Relation, ...] = ("single", "then", "while")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSet:
    """Latents and the truths of their clips."""

    latents_BCTF: Tensor
    """float16."""
    truths: list[CaptionTruth]


def _encode(scenes: list[Scene], vae: AutoencoderKL, log_mel: LogMel) -> NDArray[np.float16]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mel = mel_frames(torch.from_numpy(np.stack([s.waveform for s in scenes])), log_mel)
        latents = vae.encode(mel).latent_dist.mean
    return latents.half().numpy()


def make_shard(path: Path, number: int, config: SceneConfig, vae: AutoencoderKL) -> None:
    """Render and encode the scenes of one shard; written under a temporary name, then renamed."""
    log_mel = LogMel()
    latents, classes, relations = [], [], []
    for start in range(number * SHARD, (number + 1) * SHARD, 16):
        scenes = [make_scene(SEED, i, config) for i in range(start, start + 16)]
        latents.append(_encode(scenes, vae, log_mel))
        for scene in scenes:
            indices = [CLASSES.index(name) for name in scene.truth.classes]
            classes.append(indices + [-1] * (3 - len(indices)))
            relations.append(RELATIONS.index(scene.truth.relation))
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary, latents=np.concatenate(latents), classes=np.array(classes), relations=np.array(relations)
    )
    temporary.replace(path)


def load_shards(folder: Path, pattern: str) -> LatentSet:
    """Load all shards whose names match; the first dimension is the scenes, in order."""
    parts, truths = [], []
    for path in sorted(folder.glob(pattern)):
        with np.load(path) as shard:
            parts.append(torch.from_numpy(shard["latents"]))
            truths += [
                CaptionTruth(classes=tuple(CLASSES[i] for i in row if i >= 0), relation=RELATIONS[relation])
                for row, relation in zip(shard["classes"], shard["relations"], strict=True)
            ]
    if not parts:
        raise SystemExit(
            f"error: no latents at {folder}/{pattern}: run python -m training.mini.latents first"
        )
    return LatentSet(latents_BCTF=torch.cat(parts), truths=truths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--scenes", type=int, default=16 * SHARD, help="scenes of 2.56 s")
    parser.add_argument("--long-scenes", type=int, default=3 * SHARD, help="scenes of 5.12 s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(arguments.work / "autoencoder" / "final").eval()
    folder = arguments.work / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [("short", SHORT, n) for n in range(arguments.scenes // SHARD)]
    jobs += [("long", LONG, n) for n in range(arguments.long_scenes // SHARD)]
    for kind, config, number in tqdm(jobs, desc="latents", unit="shard"):
        path = folder / f"{kind}-{number:04d}.npz"
        if not path.exists():
            make_shard(path, number, config, vae)


if __name__ == "__main__":
    main()
