"""Measure a reward model of the mini family, next to the CLAP models, on pairs of clips of held-out prompts.

    python -m training.mini.evaluate_reward --prompts 400 --output benchmarks/mini-reward.json

Real pairs: the scene of the prompt, against one with two events swapped, one missing, one replaced, both at
the same time, or nothing right; for prompts of events at the same time, against one after the other; and
against clips without an event (`BACKGROUNDS`).
Generated pairs: clips of `mini-base` by the tagger's detections: in order against reversed, all events
against one missing. The tagger is the judge, and no training used it.
Calibration: the probabilities of all these clips against the share that is right, with a plot (`--plot`).
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from services.models.clap.loading import load_clap
from services.models.clap.model import ClapModel
from services.models.latent import clip_generator
from services.models.manifest import verify_manifest
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from services.models.reward.model import RewardModel, load_reward
from services.models.tango.loading import load_tango
from training.evaluation.events import EventComparison, compare_events
from training.evaluation.prompts import PROMPTS, held_out_prompts
from training.mini.evaluate import interval
from training.mini.evaluate_clap import NEGATIVES
from training.objectives.calibration import expected_calibration_error, reliability, sigmoid
from training.objectives.reliability_plot import reliability_figure
from training.soundworld.captions import CaptionTruth, Relation
from training.soundworld.scenes import BACKGROUNDS, background, draw_truth, render

Waveform = NDArray[np.float32]
Score = Callable[[Sequence[str], Sequence[Waveform]], Tensor]
"""Prompts and clips at 16 kHz to values [B]."""
SEED = 1_010
BATCH = 32
SEQUENCES = replace(PROMPTS, single=0.0, sequence=1.0)
TOGETHER = replace(PROMPTS, single=0.0, sequence=0.0)


def another(truth: CaptionTruth, rng: np.random.Generator) -> CaptionTruth:
    """Return a sequence of which no event is in `truth`."""
    while True:
        other = draw_truth(rng, SEQUENCES)
        if not set(other.classes) & set(truth.classes):
            return other


def other_relation(truth: CaptionTruth, rng: np.random.Generator) -> CaptionTruth:
    """Return the events at the same time if they follow each other, and in any order if not."""
    relation: Relation = "then" if truth.relation == "while" else "while"
    classes = [truth.classes[i] for i in rng.permutation(len(truth.classes))]
    return CaptionTruth(classes=tuple(classes), relation=relation)


MISTAKES = NEGATIVES | {"other": another, "together": other_relation, "apart": other_relation}
"""What may be wrong with a clip, by name. `apart`: of prompts of events at the same time."""


def reward_score(model: RewardModel) -> Score:
    """Return the rewards of `model`."""
    return lambda prompts, clips: model.reward(prompts, [model.prepare(clip, 16_000) for clip in clips])


def clap_score(model: ClapModel) -> Score:
    """Return the CLAP scores of `model`."""
    return lambda prompts, clips: model.score(prompts, clips, 16_000)


def values(score: Score, prompts: Sequence[str], clips: Sequence[Waveform]) -> Tensor:
    """Return all values [B], a batch at a time."""
    parts = [slice(i, i + BATCH) for i in range(0, len(prompts), BATCH)]
    return torch.cat([score(prompts[part], clips[part]) for part in parts])


def pair_accuracy(
    score: Score, pairs: Sequence[tuple[str, Waveform, Waveform]]
) -> tuple[float, float, float] | None:
    """Share of (prompt, chosen, rejected) with the chosen above the rejected, with its interval."""
    if not pairs:
        return None
    prompts = [prompt for prompt, _, _ in pairs]
    chosen = values(score, prompts, [clip for _, clip, _ in pairs])
    rejected = values(score, prompts, [clip for _, _, clip in pairs])
    # The interval is over prompts: several pairs of one prompt are not independent.
    hits: dict[str, list[float]] = {}
    for prompt, hit in zip(prompts, (chosen > rejected).tolist(), strict=True):
        hits.setdefault(prompt, []).append(float(hit))
    return interval(list(hits.values()))


def real_pairs(kind: str, count: int) -> list[tuple[str, Waveform, Waveform]]:
    """Return prompts of sequences, each with its scene and one that is wrong in one way."""
    pairs = []
    for index, (caption, truth) in enumerate(
        held_out_prompts(count, TOGETHER if kind == "apart" else SEQUENCES)
    ):
        rng = np.random.default_rng([SEED, index])
        chosen = render(truth, SEQUENCES.duration, rng)[0]
        if kind in BACKGROUNDS:
            rejected = background(kind, SEQUENCES.duration, rng)
        else:
            rejected = render(MISTAKES[kind](truth, rng), SEQUENCES.duration, rng)[0]
        pairs.append((caption, chosen, rejected))
    return pairs


def calibration(
    score: Score, pairs: Mapping[str, Sequence[tuple[str, Waveform, Waveform]]]
) -> tuple[dict[str, object], NDArray[np.float64], NDArray[np.float64]]:
    """Return expected calibration error and bins over the clips of all pairs; probabilities and labels."""
    rows: dict[tuple[str, bytes], tuple[Waveform, float]] = {}
    for found in pairs.values():
        for prompt, chosen, rejected in found:
            rows[prompt, chosen.tobytes()] = (chosen, 1.0)
            rows[prompt, rejected.tobytes()] = (rejected, 0.0)
    logits = values(score, [prompt for prompt, _ in rows], [clip for clip, _ in rows.values()])
    probabilities, labels = sigmoid(logits), np.array([label for _, label in rows.values()])
    figures: dict[str, object] = {
        "clips": len(labels),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "bins": [asdict(part) for part in reliability(probabilities, labels, 10)],
    }
    return figures, probabilities, labels


def generated_clips(count: int, seeds: int) -> list[list[tuple[EventComparison, Waveform]]]:
    """Return clips of `mini-base` with the tagger's verdicts: a list for each held-out sequence."""
    pipeline = load_tango(mini_folder("mini-base"))
    tagger = EventTagger.from_pretrained(mini_folder("tagger")).float().eval()
    drawn = held_out_prompts(count, SEQUENCES)
    rows: list[list[tuple[EventComparison, Waveform]]] = [[] for _ in drawn]
    for start in tqdm(range(0, count, 8), desc="clips", unit="batch"):
        part = drawn[start : start + 8]
        for seed in range(seeds):
            generators = [clip_generator(SEED + seed, start + i) for i in range(len(part))]
            clips = pipeline([caption for caption, _ in part], generator=generators).audios
            detected = tagger.detect(torch.from_numpy(clips))
            for i, (_, truth) in enumerate(part):
                rows[start + i].append((compare_events(truth, detected[i], SEQUENCES.duration), clips[i]))
    return rows


def generated_pairs(
    rows: list[list[tuple[EventComparison, Waveform]]],
    prompts: list[str],
    better: Callable[[EventComparison], bool],
    worse: Callable[[EventComparison], bool],
) -> list[tuple[str, Waveform, Waveform]]:
    """Return every pair of clips of one prompt of which one is `better` and the other `worse`."""
    return [
        (prompt, chosen, rejected)
        for prompt, row in zip(prompts, rows, strict=True)
        for first, chosen in row
        if better(first)
        for second, rejected in row
        if worse(second)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", type=Path, default=mini_folder("reward"), help="a reward model's folder")
    parser.add_argument("--prompts", type=int, default=400, help="of the real pairs of each kind")
    parser.add_argument("--generated", type=int, default=120, help="prompts of the generated pairs")
    parser.add_argument("--seeds", type=int, default=6, help="clips of a prompt")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--plot", type=Path, help="write the reliability of the probabilities here as PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    claps = {name: load_clap(mini_folder(name)) for name in ("clap-a", "clap-b")}
    digest = verify_manifest(mini_folder("clap-a")).digest
    reward = load_reward(arguments.reward, claps["clap-a"], digest)
    scores = {"reward": reward_score(reward)} | {name: clap_score(clap) for name, clap in claps.items()}
    kinds = (*MISTAKES, *BACKGROUNDS)
    pairs = {f"real, {kind}": real_pairs(kind, arguments.prompts) for kind in kinds}
    rows = generated_clips(arguments.generated, arguments.seeds)
    prompts = [caption for caption, _ in held_out_prompts(arguments.generated, SEQUENCES)]
    pairs["generated, reversed"] = generated_pairs(
        rows, prompts, lambda v: v.in_order is True, lambda v: v.reversed is True
    )
    pairs["generated, missing"] = generated_pairs(rows, prompts, lambda v: v.present, lambda v: not v.present)
    report: dict[str, object] = {
        "prompts": {"real": arguments.prompts, "generated": arguments.generated, "seeds": arguments.seeds},
        "torch": torch.__version__,
    }
    for kind, found in pairs.items():
        report[kind] = {"pairs": len(found), "prompts": len({prompt for prompt, _, _ in found})} | {
            name: pair_accuracy(score, found) for name, score in scores.items()
        }
    report["calibration"], probabilities, labels = calibration(scores["reward"], pairs)
    if arguments.plot:
        arguments.plot.write_bytes(reliability_figure({"reward": probabilities}, labels))
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
