"""Draw sheets of spectrograms of the mini models.

    python -m training.mini.sheet --output docs/images
    python -m training.mini.sheet --denoiser build/mini/mini/final --output /tmp

`seeds.png`: one prompt, eight seeds. `real-and-generated.png`: scenes of the world next to what the model
makes of their held-out captions.
"""

import argparse
from pathlib import Path

from services.audio.spectrogram import spectrogram_sheet_png
from services.models.latent import clip_generator
from services.models.mini import mini_folder
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from training.evaluation.prompts import PROMPT_SEED, PROMPTS
from training.mini.package import assemble
from training.soundworld.scenes import make_scene
from training.soundworld.synthesis import SAMPLING_RATE

PROMPT = "A dog barks then a siren wails"


def seeds_sheet(pipeline: TangoPipeline, prompt: str = PROMPT, seeds: int = 8) -> bytes:
    """PNG: `prompt` with seeds 0, 1, 2, …, with the model's default settings."""
    generators = [clip_generator(seed) for seed in range(seeds)]
    waveforms = pipeline([prompt] * seeds, generator=generators).audios
    clips = [(f"seed {seed}: {prompt}", waveform) for seed, waveform in enumerate(waveforms)]
    return spectrogram_sheet_png(clips, SAMPLING_RATE)


def comparison_sheet(pipeline: TangoPipeline, count: int = 8) -> bytes:
    """PNG: on the left scenes of the validation split, on the right clips generated from their captions."""
    clips = []
    for index in range(count):
        scene = make_scene(PROMPT_SEED, index, PROMPTS)
        generated = pipeline(scene.caption, generator=clip_generator(index)).audios[0]
        clips += [(f"world: {scene.caption}", scene.waveform), (f"model: {scene.caption}", generated)]
    return spectrogram_sheet_png(clips, SAMPLING_RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--denoiser", type=Path, help="a denoiser in training, instead of the shipped one")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    pipeline = (
        assemble(arguments.work, arguments.denoiser)
        if arguments.denoiser
        else load_tango(mini_folder("mini"))
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "seeds.png").write_bytes(seeds_sheet(pipeline))
    (arguments.output / "real-and-generated.png").write_bytes(comparison_sheet(pipeline))


if __name__ == "__main__":
    main()
