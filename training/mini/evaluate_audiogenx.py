"""Measure AudioGenX on the mini AudioGen: do its masks keep and lose the sound?

    python -m training.mini.evaluate_audiogenx --clips 60 --output benchmarks/audiogenx.json

For each held-out prompt a clip is made and explained, and made again from the same seed under the
explanation's mask p (the factual clip) and under 1 - p (the counterfactual one); the same with the entries
of p in a random order, which is a mask of the same size. The tagger compares the clips with the first one:

* KL: KL(Q || P) = sum Q (log Q - log(P + 1e-6)) in nats, of the mean over segments of softmax(logits, 0):
the events
  and "none". P is the first clip's, Q the other's. Upstream's formula, with the tagger instead of PaSST.
* Fid_F: share of the events detected in the first clip that the factual clip has too.
* Fid_CF: share of them that the counterfactual clip has not.
* mass inside: share of an event word's p that lies within the event's interval in the first clip, and the
interval's
  share of the clip (chance). The words are those that name one event only.

Shapes: S segments or steps, L text tokens, C classes, N samples.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from services.api.generation import GenerationRequest
from services.models.architectures import load_generator
from services.models.audiogen.audiogenx import ITERATIONS
from services.models.audiogen.explainer import AudioGenExplainer, MadeClip, ReadText
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.latent import clip_generator
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger, detections
from training.evaluation.prompts import held_out_prompts
from training.objectives.statistics import mean_interval
from training.soundworld.captions import word_classes

SMALLEST = 1e-6


def label_distribution(logits_SC: Tensor) -> Tensor:
    """Return the shares [C + 1] of a clip's time that the events and none take, by the tagger's logits."""
    with_none = torch.cat([logits_SC, torch.zeros_like(logits_SC[:, :1])], dim=1)
    return with_none.softmax(-1).mean(0)


def kl_divergence(p_C: Tensor, q_C: Tensor) -> float:
    """Return KL(Q || P) in nats: what `q_C` has that `p_C` has not."""
    return float((q_C * ((q_C + 1e-12).log() - (p_C + SMALLEST).log())).sum())


class Judge:
    """The tagger's view of clips."""

    def __init__(self) -> None:
        self._tagger = EventTagger.from_pretrained(mini_folder("tagger")).float().eval()

    @torch.no_grad()
    def __call__(self, waveform_1N: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the label distribution of a clip, and its detected events."""
        logits_SC = self._tagger(waveform_1N)[0]
        found = detections(logits_SC.sigmoid(), self._tagger.config.classes, self._tagger.segment_seconds)
        return label_distribution(logits_SC), found


def shuffled(p_SL: Tensor, seed: int) -> Tensor:
    """Return the entries of a mask in a random order: a random mask of the same size."""
    order = torch.randperm(p_SL.numel(), generator=clip_generator(seed, 1))
    return p_SL.flatten()[order].view_as(p_SL)


def mass_inside(
    explainer: AudioGenExplainer, p_SL: Tensor, text: ReadText, events: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Return, for each event word of a detected event, the share of its mass inside, and chance."""
    classes, rows = word_classes(), []
    matrix_VT = explainer.by_word(p_SL, text)
    times_T = (torch.arange(matrix_VT.shape[1]) + 0.5) * explainer.frame_seconds
    for word, row_T in zip(text.words, matrix_VT, strict=True):
        event = events.get(classes.get(word.text.lower(), ""))
        if event is not None:
            inside_T = (times_T >= event.onset) & (times_T <= event.offset)
            rows.append((float(row_T[inside_T].sum() / row_T.sum()), float(inside_T.float().mean())))
    return rows


def examine(
    explainer: AudioGenExplainer, judge: Judge, prompt: str, seed: int, *, history: bool, iterations: int
) -> dict[str, float]:
    """Explain one clip; return its figures."""
    defaults = explainer.description.generation.defaults
    request = GenerationRequest.of(prompt, defaults, seed=seed)
    text = explainer.read(prompt)
    made = explainer.generate(request, text)
    began = time.process_time()
    learned = explainer.learn(made, text, seed=seed, iterations=iterations, history=history)
    seconds = time.process_time() - began
    original_C, events = judge(explainer.waveform(made, request.duration))

    def compared(mask_SL: Tensor) -> tuple[float, float, MadeClip]:
        """KL, and the share of the first clip's events that are there."""
        other = explainer.generate(request, text, mask_SL=mask_SL)
        found_C, found = judge(explainer.waveform(other, request.duration))
        kept = len(events.keys() & found.keys()) / len(events) if events else math.nan
        return kl_divergence(original_C, found_C), kept, other

    figures = {"size": float(learned.p_SL.mean()), "cpu_seconds": seconds}
    figures["factual_cosine"] = -learned.trace[-1][0] / len(learned.p_SL)
    figures["counterfactual_cosine"] = learned.trace[-1][1] / len(learned.p_SL)
    for name, p_SL in (("learned", learned.p_SL), ("random", shuffled(learned.p_SL, seed))):
        figures[f"{name}_kl_factual"], figures[f"{name}_fid_f"], _ = compared(p_SL)
        figures[f"{name}_kl_counterfactual"], kept, _ = compared(1 - p_SL)
        figures[f"{name}_fid_cf"] = 1 - kept
    inside = mass_inside(explainer, learned.p_SL, text, events)
    if inside:
        figures["mass_inside"], figures["mass_chance"] = np.mean(inside, axis=0).tolist()
    return figures


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return each figure's mean with its 95 % interval, and paired differences from random masks."""
    for row in rows:
        for name in ("kl_factual", "kl_counterfactual", "fid_f", "fid_cf"):
            row[f"difference_{name}"] = row[f"learned_{name}"] - row[f"random_{name}"]
        row["mass_above_chance"] = row.get("mass_inside", math.nan) - row.get("mass_chance", math.nan)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: asdict(mean_interval([row.get(name, math.nan) for row in rows])) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: the shipped audiogen")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--upstream", action="store_true", help="upstream's form, without history")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_generator(arguments.model or mini_folder("audiogen"))
    assert isinstance(pipeline, AudioGenPipeline)
    explainer, judge = AudioGenExplainer(pipeline), Judge()
    rows = [
        examine(
            explainer, judge, prompt, seed, history=not arguments.upstream, iterations=arguments.iterations
        )
        for seed, (prompt, _) in enumerate(tqdm(held_out_prompts(arguments.clips), unit="clip"))
    ]
    report = {
        "clips": len(rows),
        "iterations": arguments.iterations,
        "form": "upstream, without history" if arguments.upstream else "with history",
        "torch": torch.__version__,
        "figures": summary(rows),
    }
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
