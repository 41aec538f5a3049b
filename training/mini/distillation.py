"""Continue a text encoder so that the denoisers of an earlier edition read it as they read their own.

    python -m training.mini.package --restore --work OLD            # before they change
    python -m training.mini.text_encoder --work build/mini --init OLD/text_encoder
    python -m training.mini.distillation --work build/mini --old OLD

The teacher is a denoiser with the earlier text encoder and a caption of the first edition's templates and
words. The student is the same denoiser with the new text encoder and any caption of the same truth. Their
predictions are brought together; only the text encoder is trained, and written over its start. So the
denoisers learn a larger grammar without a training of their own.

Shape legend: B batch, C latent channels, T latent frames, F latent mel bins.
"""

import argparse
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from services.models.mel import LogMel, mel_frames
from training.loop.fit import LoopConfig
from training.mini.denoiser import CONDITION_DROPOUT, TextSide, schedule
from training.mini.parsing import UNREAD
from training.mini.parts import train_part
from training.mini.text_encoder import TEXT_LENGTH
from training.soundworld.captions import VOCABULARY, CaptionTruth, Templates, write_caption
from training.soundworld.scenes import SHORT, SceneConfig, draw_truth, make_scene, split_of

SEED = 515
BATCH = 16
LONG = SceneConfig(duration=5.12, single=0.1, sequence=0.6, three=0.5)
LONG_EVERY = 4
"""Every this many steps the latents are as long as clips of 5.12 s, half as many."""
CLIPS = 512
"""Scenes whose latents are denoised; the other half of a batch is noise alone."""
LOOP = LoopConfig(steps=600, batch=BATCH, learning_rate=5e-4, warmup=30, decay=0.5, ema=0.98)
DENOISERS: Final = ("mini", "mini-base")
PARSED: Final = "parsed"
"""Folder of the text encoder before the distillation."""
FIRST_TEMPLATES: Final[Templates] = {
    ("single", 1): ("{a}", "{A}"),
    ("then", 2): (
        "{a} then {b}",
        "{a}, then {b}",
        "{a} and then {b}",
        "{A} followed by {B}",
        "{b} after {a}",
        "after {a}, {b}",
        "{a} before {b}",
    ),
    ("while", 2): ("{a} while {b}", "{a} and {b}", "{A} and {B}", "while {a}, {b}"),
    ("then", 3): ("{a} then {b} then {c}", "{A}, followed by {B}, followed by {C}"),
}


def first_caption(truth: CaptionTruth, rng: np.random.Generator, known: Set[str]) -> str:
    """Return a caption of `truth` as the first edition wrote them, of words that are `known`."""
    templates = FIRST_TEMPLATES[truth.relation, len(truth.classes)]
    slots: dict[str, str] = {}
    for letter, name in zip("abc", truth.classes, strict=False):
        pairs = [
            (noun.singular[0], verb)
            for words in VOCABULARY[name]
            for noun in words.nouns
            for verb in words.verbs
            if noun.singular and {*noun.singular[0].split(), *verb.singular.split()} <= known
        ]
        noun, verb = pairs[int(rng.integers(len(pairs)))]
        slots |= {letter: f"{noun} {verb.singular}", letter.upper(): f"{noun} {verb.gerund}"}
    return templates[int(rng.integers(len(templates)))].format(**slots)


def new_caption(truth: CaptionTruth, rng: np.random.Generator) -> str:
    """Return a caption of the training split."""
    while True:
        caption = write_caption(truth, rng, unread=UNREAD)
        if split_of(caption) == "train":
            return caption


@torch.no_grad()
def scene_latents(vae: AutoencoderKL, count: int) -> tuple[Tensor, list[CaptionTruth]]:
    """Return latents [B, C, T, F] of scenes of the shorter duration, and their truths."""
    log_mel, latents, truths = LogMel(), [], []
    for start in range(0, count, BATCH):
        scenes = [make_scene(SEED, i, SHORT) for i in range(start, min(start + BATCH, count))]
        mel = mel_frames(torch.from_numpy(np.stack([scene.waveform for scene in scenes])), log_mel)
        latents.append(vae.encode(mel).latent_dist.mean)
        truths += [scene.truth for scene in scenes]
    return torch.cat(latents), truths


class Student(nn.Module):
    """The text encoder that is trained, as `training.mini.text_encoder` left it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        parsed = folder / PARSED
        self.encoder = T5EncoderModel.from_pretrained(parsed if parsed.exists() else folder / "final")

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings and mask, padded as when serving."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        mask_BL = tokens["attention_mask"]
        hidden = self.encoder(input_ids=tokens["input_ids"], attention_mask=mask_BL).last_hidden_state
        return hidden, mask_BL.bool()


def predict(unet: nn.Module, noisy: Tensor, timesteps_B: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """Return the predicted velocity in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        v = unet(noisy, timesteps_B, encoder_hidden_states=text[0], encoder_attention_mask=text[1]).sample
    velocity: Tensor = v.float()
    return velocity


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--old", type=Path, required=True, help="the earlier edition's parts")
    parser.add_argument("--steps", type=int, default=LOOP.steps)
    parser.add_argument("--learning-rate", type=float, default=LOOP.learning_rate)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    teacher = TextSide(arguments.old / "text_encoder", length=None)
    known = teacher.tokenizer.get_vocab().keys()
    unets = [
        UNet2DConditionModel.from_pretrained(arguments.old / name / "final").eval() for name in DENOISERS
    ]
    for unet in unets:
        unet.requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(arguments.work / "autoencoder" / "final").eval()
    clean_BCTF, truths = scene_latents(vae, CLIPS)
    ddpm = schedule()
    student = Student(arguments.work / "text_encoder")

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([SEED, step])
        unet = unets[step % len(unets)]
        if step % LONG_EVERY == LONG_EVERY - 1:
            told = [draw_truth(rng, LONG) for _ in range(BATCH // 2)]
            shape = (len(told), *clean_BCTF.shape[1:2], 2 * clean_BCTF.shape[2], clean_BCTF.shape[3])
            noisy = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
            timesteps = torch.from_numpy(rng.integers(900, 1000, len(told)))
        else:
            picked = rng.integers(0, len(truths), BATCH)
            told = [truths[i] for i in picked]
            noise = torch.from_numpy(rng.standard_normal(clean_BCTF[picked].shape, dtype=np.float32))
            half = BATCH // 2
            low = np.where(np.arange(BATCH) < half, 900, 300)
            timesteps = torch.from_numpy((low + rng.uniform(size=BATCH) * (1000 - low)).astype(np.int64))
            noisy = ddpm.add_noise(clean_BCTF[picked], noise, timesteps)
            noisy[:half] = noise[:half]
        empty = rng.uniform(size=len(told)) < CONDITION_DROPOUT
        old = ["" if e else first_caption(t, rng, known) for t, e in zip(told, empty, strict=True)]
        new = ["" if e else new_caption(t, rng) for t, e in zip(told, empty, strict=True)]
        with torch.no_grad():
            target = predict(unet, noisy, timesteps, teacher(old))
        error = (predict(unet, noisy, timesteps, student(new)) - target).square().mean()
        return 100 * error, {}

    folder = arguments.work / "distillation"
    config = replace(LOOP, steps=arguments.steps, learning_rate=arguments.learning_rate)
    train_part(student, loss_at, config, folder, title="distillation")
    encoders = arguments.work / "text_encoder"
    if not (encoders / PARSED).exists():
        (encoders / "final").rename(encoders / PARSED)
    student.encoder.save_pretrained(encoders / "final", safe_serialization=True)


if __name__ == "__main__":
    main()
