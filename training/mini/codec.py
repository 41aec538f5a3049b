"""Quantise the mini autoencoder's latents: the codec of the mini AudioGen.

    python -m training.mini.codec --work build/mini

Principal components of the latent frames, then residual k-means: each codebook is fitted to what the earlier
ones left over. Prints how well the tagger recognises real scenes that went through the codec.

Shapes: R frames, D their values, P principal components, V codes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from scipy.cluster.vq import kmeans2
from torch import Tensor

from services.models.audiogen.codec import QuantisedAutoencoder
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from training.evaluation.events import compare_events, event_metrics
from training.evaluation.prompts import PROMPT_SEED, PROMPTS
from training.mini.latents import load_shards
from training.soundworld.scenes import make_scene

SEED = 1_616
FRAMES = 32_768
"""Latent frames that codebooks are fitted to."""
ITERATIONS = 12


def fit_quantiser(codec: QuantisedAutoencoder, frames_RD: Tensor) -> float:
    """Fit mean, components and codebooks in place; return the share of the variance that they leave."""
    rng = np.random.default_rng(SEED)
    mean_D = frames_RD.mean(0)
    count, components = len(codec.codebooks), len(codec.directions)
    directions_PD = torch.linalg.svd(frames_RD - mean_D, full_matrices=False).Vh[:components]
    rest_RP = ((frames_RD - mean_D) @ directions_PD.T).numpy()
    books = []
    for _ in range(count):
        book_VP, code_R = kmeans2(
            rest_RP, codec.config.codebook_size, iter=ITERATIONS, minit="++", seed=rng, missing="raise"
        )
        books.append(book_VP)
        rest_RP = rest_RP - book_VP[code_R]
    with torch.no_grad():
        codec.mean.copy_(mean_D)
        codec.directions.copy_(directions_PD)
        codec.codebooks.copy_(torch.from_numpy(np.stack(books)))
    return float(np.square(rest_RP).sum() / (frames_RD - mean_D).square().sum())


@torch.no_grad()
def fidelity(codec: QuantisedAutoencoder, clips: int) -> dict[str, float]:
    """Return the tagger's figures on real scenes that the codec encoded and decoded."""
    tagger = EventTagger.from_pretrained(mini_folder("tagger")).float().eval()
    rows = []
    for index in range(clips):
        scene = make_scene(PROMPT_SEED, index, PROMPTS)
        encoded = codec.encode(torch.from_numpy(scene.waveform)[None, None])
        rebuilt = codec.decode(encoded.audio_codes, encoded.audio_scales).audio_values[0]
        rows.append(event_metrics(compare_events(scene.truth, tagger.detect(rebuilt)[0])))
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--clips", type=int, default=300, help="real scenes of the fidelity check")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(arguments.work / "autoencoder" / "final").eval()
    sizes = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    codec = QuantisedAutoencoder(autoencoder=sizes).eval()
    codec.vae.load_state_dict(vae.state_dict())
    latents_BCTF = load_shards(arguments.work / "latents", "short-*.npz").latents_BCTF
    frames_RD = latents_BCTF.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    picked = np.random.default_rng(SEED).choice(len(frames_RD), min(FRAMES, len(frames_RD)), replace=False)
    left = fit_quantiser(codec, frames_RD[picked].float())
    print(f"{100 * left:.1f} % of the latents' variance is left over")
    codec.save_pretrained(arguments.work / "codec" / "final", safe_serialization=True)
    print({name: round(value, 3) for name, value in fidelity(codec, arguments.clips).items()})


if __name__ == "__main__":
    main()
