"""Measure a generator of the mini family on held-out prompts, by the tagger.

    python -m training.mini.evaluate --prompts 300 --seeds 2 --reconstruction 300    # the shipped folders
    python -m training.mini.evaluate --denoiser build/mini/mini/final --prompts 100  # one in training

Prompts are the validation split's: no denoiser has seen their wording with any clip.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tqdm import tqdm

from services.audio.levels import is_silent
from services.models.architectures import load_generator
from services.models.audio_pipeline import AudioPipeline
from services.models.latent import clip_generator
from services.models.mel import LogMel, mel_frames
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from services.models.tango.pipeline import TangoPipeline
from training.evaluation.events import (
    EVENT_METRICS,
    EventComparison,
    compare_events,
    event_metrics,
    is_clipped,
    overshoots,
)
from training.evaluation.prompts import LONG_PROMPTS, PROMPT_SEED, PROMPTS, held_out_prompts
from training.mini.package import assemble, assemble_audiogen
from training.objectives.statistics import mean_interval
from training.soundworld.scenes import DURATIONS, make_scene
from training.soundworld.synthesis import CLASSES

BATCH = 8


def interval(values: list[list[float]]) -> tuple[float, float, float]:
    """Mean over clips with its 95 % interval over prompts (each a list of its clips' values)."""
    groups = [number for number, prompt in enumerate(values) for _ in prompt]
    found = mean_interval([value for prompt in values for value in prompt], groups)
    return found.value, found.low, found.high


def summarise(verdicts: list[list[EventComparison]]) -> dict[str, object]:
    """Return figures over prompts (outer list) and their clips (inner list), in all and by class."""

    def figures(prompts: list[list[EventComparison]]) -> dict[str, tuple[float, float, float]]:
        rows = [[event_metrics(verdict) for verdict in prompt] for prompt in prompts]
        return {
            name: interval([[row[name] for row in prompt if not math.isnan(row[name])] for prompt in rows])
            for name in EVENT_METRICS
        }

    def by_class(name: str) -> dict[str, float]:
        naming = [p for p in verdicts if name in p[0].truth.classes]
        detected = interval([[float(name in v.detected) for v in p] for p in naming])[0]
        return {"heard": detected} | {key: value[0] for key, value in figures(naming).items()}

    named = {name for prompt in verdicts for name in prompt[0].truth.classes}
    return {
        "clips": sum(map(len, verdicts)),
        **figures(verdicts),
        "by_class": {name: by_class(name) for name in CLASSES if name in named},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Options of the generation; None is the model's default."""

    duration: float = 2.56
    """Seconds a clip: 2.56 or 5.12."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    held_out_templates: bool = False
    """Prompts by the templates of no training, not only with wordings of none."""


def evaluate_generation(
    pipeline: AudioPipeline, tagger: EventTagger, *, prompts: int, seeds: int, sampling: Sampling
) -> dict[str, object]:
    """Generate `seeds` clips of each held-out prompt and compare_events them."""
    config = PROMPTS if sampling.duration == PROMPTS.duration else LONG_PROMPTS
    drawn = held_out_prompts(prompts, replace(config, held_out_templates=sampling.held_out_templates))
    verdicts: list[list[EventComparison]] = []
    silent = clipped = overshoot = 0
    for start in tqdm(range(0, prompts, BATCH), desc="clips", unit="batch", mininterval=5.0):
        part = drawn[start : start + BATCH]
        rows: list[list[EventComparison]] = [[] for _ in part]
        for seed in range(seeds):
            generators = [clip_generator(seed, start + i) for i in range(len(part))]
            output = pipeline(
                [caption for caption, _ in part],
                audio_length_in_s=sampling.duration,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                scheduler=sampling.scheduler,
                generator=generators,
            )
            silent += sum(map(is_silent, output.audios))
            clipped += sum(map(is_clipped, output.audios))
            overshoot += sum(map(overshoots, output.audios))
            detected = tagger.detect(torch.from_numpy(output.audios))
            for row, (_, truth), found in zip(rows, part, detected, strict=True):
                row.append(compare_events(truth, found, sampling.duration))
        verdicts += rows
    return summarise(verdicts) | {"silent": silent, "clipped": clipped, "overshoot": overshoot}


@torch.no_grad()
def evaluate_reconstruction(pipeline: TangoPipeline, tagger: EventTagger, *, clips: int) -> dict[str, object]:
    """Tag real scenes as they are, and after autoencoder and vocoder; and the log-mel error."""
    log_mel, real, rebuilt, errors = LogMel(), [], [], []
    for index in range(clips):
        scene = make_scene(PROMPT_SEED, index, PROMPTS)
        waveform = torch.from_numpy(scene.waveform)[None]
        mel = mel_frames(waveform, log_mel)
        latents = pipeline.encode_audio(waveform)
        errors.append(float((pipeline.decode_mel(latents) - mel[:, 0]).abs().mean()))
        real.append([compare_events(scene.truth, tagger.detect(waveform)[0])])
        rebuilt.append([compare_events(scene.truth, tagger.detect(pipeline.decode(latents))[0])])
    return {"log_mel_l1": float(np.mean(errors)), "real": summarise(real), "rebuilt": summarise(rebuilt)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument(
        "--denoiser", type=Path, help="a denoiser in training, instead of the shipped folders"
    )
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--model",
        action="append",
        choices=("mini", "mini-base", "audiogen"),
        help="default: mini and mini-base",
    )
    parser.add_argument("--duration", type=float, choices=DURATIONS, default=2.56)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--scheduler")
    parser.add_argument(
        "--held-out-templates", action="store_true", help="prompts by templates of no training"
    )
    parser.add_argument("--reconstruction", type=int, default=0, help="real clips to rebuild as well")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.denoiser:
        folder, work = arguments.denoiser, arguments.work
        make = assemble_audiogen if (folder / "decoder").is_dir() else assemble
        models: dict[str, AudioPipeline] = {str(folder): make(work, folder)}
        tagger = EventTagger.from_pretrained(arguments.work / "tagger" / "final").eval()
    else:
        names = arguments.model or ("mini", "mini-base")
        models = {name: cast(AudioPipeline, load_generator(mini_folder(name))) for name in names}
        tagger = EventTagger.from_pretrained(mini_folder("tagger")).float().eval()
    sampling = Sampling(
        duration=arguments.duration,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        scheduler=arguments.scheduler,
        held_out_templates=arguments.held_out_templates,
    )
    report: dict[str, object] = {
        "prompts": arguments.prompts,
        "seeds": arguments.seeds,
        "sampling": asdict(sampling),
        "torch": torch.__version__,
    }
    if arguments.reconstruction:
        first = next(one for one in models.values() if isinstance(one, TangoPipeline))
        report["reconstruction"] = evaluate_reconstruction(first, tagger, clips=arguments.reconstruction)
    for name, pipeline in models.items():
        pipeline.set_progress_bar_config(disable=True)
        report[name] = evaluate_generation(
            pipeline, tagger, prompts=arguments.prompts, seeds=arguments.seeds, sampling=sampling
        )
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
