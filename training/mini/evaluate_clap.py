"""Measure the mini CLAP models on held-out prompts and scenes.

    python -m training.mini.evaluate_clap --clips 1000 --output benchmarks/mini-clap.json

Captions are of the validation split. Retrieval: the own caption of a clip among a hundred of other meaning.
Against a hard negative: the true caption scores higher than one with an event missing, replaced, or moved.
Above empty: a clip scores higher for its caption than the best of fifty clips without an event.

Shape legend: B clips, D embedding width.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from services.models.clap.loading import load_clap
from services.models.clap.model import ClapModel
from services.models.mini import mini_folder
from training.mini.clap import same_caption
from training.mini.evaluate import interval
from training.soundworld.captions import (
    CaptionTruth,
    drop,
    replace_event,
    swap,
    write_caption,
)
from training.soundworld.scenes import BACKGROUNDS, Scene, SceneConfig, background, make_scene, split_of

SEED = 909
SCENES = SceneConfig(single=0.2, sequence=0.5, split="validation")
LONG_SCENES = SceneConfig(duration=5.12, single=0.15, sequence=0.6, three=0.35, split="validation")
GROUP = 100
"""Clips, and captions, of one retrieval."""
BATCH = 50
TRIES = 300
"""Wordings to draw before a truth counts as having none held out."""
NEGATIVES: dict[str, Callable[[CaptionTruth, np.random.Generator], CaptionTruth]] = {
    "replaced": replace_event,
    "missing": drop,
    "swapped": swap,
}


def wrong_caption(kind: str, truth: CaptionTruth, rng: np.random.Generator) -> str | None:
    """Return a held-out caption that is wrong in one way, or None if there is none.

    One event can't be missing, only sequences can be swapped, and the few wordings of a single event may all
    be of the training split.
    """
    if (kind == "missing" and len(truth.classes) == 1) or (kind == "swapped" and truth.relation != "then"):
        return None
    for _ in range(TRIES):
        caption = write_caption(NEGATIVES[kind](truth, rng), rng)
        if split_of(caption) != "train":
            return caption
    return None


def retrieval(audio_BD: Tensor, text_BD: Tensor, truths: list[CaptionTruth]) -> dict[str, object]:
    """Return the top-1 accuracy of the own caption (clip) among `GROUP`, without twins, with intervals."""
    by_audio, by_text = [], []
    for start in range(0, len(truths), GROUP):
        part = slice(start, start + GROUP)
        similarity = (audio_BD[part] @ text_BD[part].T).masked_fill(same_caption(truths[part]), -2.0)
        own = torch.arange(len(similarity))
        by_audio += [[float(hit)] for hit in similarity.argmax(1) == own]
        by_text += [[float(hit)] for hit in similarity.argmax(0) == own]
    return {"caption_of_clip": interval(by_audio), "clip_of_caption": interval(by_text)}


def against_negatives(model: ClapModel, audio_BD: Tensor, scenes: list[Scene]) -> dict[str, object]:
    """Return how often the true caption scores above a wrong one, by kind of mistake."""
    found: dict[str, object] = {}
    for kind in NEGATIVES:
        rng = np.random.default_rng(SEED)
        pairs = [(scene.caption, wrong_caption(kind, scene.truth, rng)) for scene in scenes]
        rows = [(i, true, wrong) for i, (true, wrong) in enumerate(pairs) if wrong is not None]
        sound = audio_BD[[i for i, _, _ in rows]]
        true = (sound * model.embed_text([t for _, t, _ in rows])).sum(1)
        wrong_B = (sound * model.embed_text([w for _, _, w in rows])).sum(1)
        found[kind] = interval([[float(hit)] for hit in true > wrong_B])
    return found


def above_empty(model: ClapModel, scores_B: Tensor, scenes: list[Scene]) -> dict[str, object]:
    """Return how often a clip scores above one without an event for its own caption, by kind."""
    found: dict[str, object] = {}
    text_BD = model.embed_text([scene.caption for scene in scenes])
    seconds = len(scenes[0].waveform) / 16_000
    for kind in BACKGROUNDS:
        rng = np.random.default_rng(SEED)
        empty_ED = model.embed_audio([background(kind, seconds, rng) for _ in range(BATCH)], 16_000)
        worse_B = (text_BD @ empty_ED.T).amax(1)
        found[kind] = interval([[float(hit)] for hit in scores_B > worse_B])
    return found


def evaluate(model: ClapModel, clips: int, config: SceneConfig) -> dict[str, object]:
    """Return all figures of one model on `clips` scenes of one length."""
    scenes = [make_scene(SEED, index, config) for index in range(clips)]
    parts = [scenes[i : i + BATCH] for i in range(0, clips, BATCH)]
    audio = [model.embed_audio([s.waveform for s in part], 16_000) for part in tqdm(parts, unit="batch")]
    audio_BD = torch.cat(audio)
    text_BD = model.embed_text([scene.caption for scene in scenes])
    scores = (audio_BD * text_BD).sum(1)
    return {
        "score": {"mean": float(scores.mean()), "std": float(scores.std())},
        "retrieval": retrieval(audio_BD, text_BD, [scene.truth for scene in scenes]),
        "against": against_negatives(model, audio_BD, scenes),
        "above_empty": above_empty(model, scores, scenes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1_000, help="of each length")
    parser.add_argument(
        "--folder", type=Path, action="append", help="a CLAP folder, instead of the shipped ones"
    )
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = arguments.folder or [mini_folder(name) for name in ("clap-a", "clap-b")]
    report: dict[str, object] = {"clips": arguments.clips, "torch": torch.__version__}
    for folder in folders:
        model = load_clap(folder)
        report[folder.name] = {
            "2.56 s": evaluate(model, arguments.clips, SCENES),
            "5.12 s": evaluate(model, arguments.clips, LONG_SCENES),
        }
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
