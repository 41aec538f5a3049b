"""Train one of the two mini CLAP models: audio and captions in one space, by contrastive learning.

    python -m training.mini.clap --name clap-a --work build/mini
    python -m training.mini.clap --name clap-a --work build/mini --init services/models/mini/clap-a

The caption of a clip is contrasted with those of the batch and with its own hard negatives: an event missing,
an event replaced, and for sequences the order swapped. Clips of silence and of noise alone are negatives of
every caption, and captions whose words are all unknown are negatives of every clip: these score below zero
with all. The architecture is that of the released models.

With `--init` the weights continue from an earlier edition's; a word that is new begins as its class.

The text encoder first learns to parse captions, and continues to during the training. So its tokens keep the
order of events, as those of a language model do, for the reward model. Its pooled embedding does not, as that
of the audio has no order either.

Shape legend: B batch, N samples, D embedding width, K captions of a clip (the true one and its negatives).
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from services.models.clap.loading import load_clap
from services.models.clap.model import ClapModel
from training.loop.fit import LoopConfig
from training.mini.parsing import Parser, continue_embeddings, parsing_batch, word_tokenizer
from training.mini.parts import train_part
from training.soundworld.captions import (
    TEMPLATES,
    UNREAD_WORDS,
    CaptionTruth,
    drop,
    replace_event,
    swap,
    word_classes,
    write_caption,
)
from training.soundworld.scenes import BACKGROUNDS, Scene, SceneConfig, background, make_scene, split_of

SEEDS = {"clap-a": 707, "clap-b": 808}
BATCH = 32
PARSED = 48
"""Captions parsed a step."""
PARSING = LoopConfig(steps=400, batch=PARSED, learning_rate=1.5e-3, warmup=50, decay=0.25)
PARSING_WEIGHT = 0.3
LOOP = LoopConfig(steps=2_400, batch=BATCH, learning_rate=1.5e-3, warmup=150, ema=0.995, decay=0.4)
TEXT_LENGTH = 40
"""Most tokens of a caption; the longest of the grammar has 27."""
UNREAD = 0.1
"""Share of the captions with a word that is not of the grammar."""
EMPTY_CLIPS, UNREAD_CAPTIONS = 6, 4
"""Clips without an event, and captions without a word of the grammar, in each batch."""
EMPTY_WEIGHT = 4.0
"""Weight of the penalty for scores above zero of captions that can't be read."""
SHORT = SceneConfig(single=0.2, sequence=0.5)
LONG = SceneConfig(duration=5.12, single=0.15, sequence=0.6, three=0.35)
LONG_EVERY = 4
"""Every this many steps the batch has clips of 5.12 s."""
KINDS = tuple(TEMPLATES)


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """``<s> a dog barks </s>``, lower case; padding is 1, as RoBERTa's position embeddings need."""
    return word_tokenizer(("<s>", "<pad>", "</s>", "<unk>"), TEXT_LENGTH)


def build(tokenizer: transformers.PreTrainedTokenizerBase) -> ClapModel:
    """HTSAT and RoBERTa as LAION pairs them, but narrow: windows of 5.12 s at 16 kHz, 64 dimensions."""
    config = transformers.ClapConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "max_position_embeddings": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": 1e-5,
            "projection_dim": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        audio_config={
            "spec_size": 128,
            "num_mel_bins": 64,
            "window_size": 8,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "patch_embeds_hidden_size": 24,
            "depths": [2, 2, 2],
            "num_hidden_layers": 3,
            "num_attention_heads": [2, 4, 8],
            "hidden_size": 96,
            "mlp_ratio": 2.0,
            "hidden_dropout_prob": 0.0,
            "projection_dim": 64,
        },
        projection_dim=64,
        logit_scale_init_value=10.0,
    )
    extractor = transformers.ClapFeatureExtractor(
        sampling_rate=16_000,
        max_length_s=5.12,
        hop_length=330,  # 249 frames, which the encoder stretches to its 256
        frequency_min=50,
        frequency_max=8_000,
        truncation="rand_trunc",
        padding="pad",
    )
    return ClapModel(transformers.ClapModel(config), tokenizer, extractor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """The captions of a clip."""

    true: str
    negatives: tuple[str, ...]


def _wording(truth: CaptionTruth, rng: np.random.Generator) -> str:
    """Return a wording of the training split."""
    while True:
        caption = write_caption(truth, rng, unread=UNREAD)
        if split_of(caption) == "train":
            return caption


def draw_captions(truth: CaptionTruth, rng: np.random.Generator) -> Captions:
    """Return a true wording and its hard negatives: replaced, missing, swapped, as far as they exist."""
    wrong = [replace_event(truth, rng)]
    if len(truth.classes) > 1:
        wrong.append(drop(truth, rng))
    if truth.relation == "then":
        wrong.append(swap(truth, rng))
    return Captions(true=_wording(truth, rng), negatives=tuple(_wording(mistake, rng) for mistake in wrong))


def same_caption(truths: list[CaptionTruth]) -> Tensor:
    """Return bool [B, B]: pairs of different clips with the same caption, which are no negatives."""
    keys = [
        (truth.relation, truth.classes if truth.relation == "then" else tuple(sorted(truth.classes)))
        for truth in truths
    ]
    alike = torch.tensor([[a == b for b in keys] for a in keys])
    return alike & ~torch.eye(len(truths), dtype=torch.bool)


def contrastive_loss(
    audio_BD: Tensor,
    text_BD: Tensor,
    negatives_BKD: Tensor,
    known_BK: Tensor,
    alike_BB: Tensor,
    scale: Tensor,
    empty_ED: Tensor,
) -> Tensor:
    """Return InfoNCE both ways.

    A clip's own hard negatives (where `known`) join its row of captions, and the `empty` clips each caption's
    row of clips.
    """
    logits_BB = (scale * audio_BD @ text_BD.T).masked_fill(alike_BB, -torch.inf)
    hard_BK = scale * torch.einsum("bd,bkd->bk", audio_BD, negatives_BKD)
    rows = torch.cat([logits_BB, hard_BK.masked_fill(~known_BK, -torch.inf)], dim=1)
    columns = torch.cat([logits_BB.T, scale * text_BD @ empty_ED.T], dim=1)
    targets = torch.arange(len(audio_BD))
    by_audio = nn.functional.cross_entropy(rows, targets)
    return 0.5 * (by_audio + nn.functional.cross_entropy(columns, targets))


def waveforms(scenes: list[Scene], rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """Return the scenes with random gains."""
    return [scene.waveform * np.float32(10 ** (rng.uniform(-8, 2) / 20)) for scene in scenes]


def unread_caption(rng: np.random.Generator) -> str:
    """Return a caption whose words, apart from those of a template, are not of the grammar."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    templates = TEMPLATES[kind]
    template = templates[int(rng.integers(len(templates)))].lower()
    subject = ("a", "the", "two", "some", "")[int(rng.integers(5))]
    unknown = " ".join([UNREAD_WORDS[0]] * int(rng.integers(1, 4)))
    return template.format(**dict.fromkeys("abc", f"{subject} {unknown}"))


def loss_of(
    model: ClapModel, scenes: list[Scene], rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of one batch, and the share of clips whose own caption scores highest in its row."""
    duration = len(scenes[0].waveform) / 16_000
    empty = [background(str(rng.choice(BACKGROUNDS)), duration, rng) for _ in range(EMPTY_CLIPS)]
    windows = torch.cat([model.prepare(waveform, 16_000) for waveform in [*waveforms(scenes, rng), *empty]])
    captions = [draw_captions(scene.truth, rng) for scene in scenes]
    most = max(len(c.negatives) for c in captions)
    known_BK = torch.tensor([[k < len(c.negatives) for k in range(most)] for c in captions])
    padded = [[*c.negatives, *[c.true] * (most - len(c.negatives))] for c in captions]
    texts = [c.true for c in captions] + [text for row in padded for text in row]
    texts += [unread_caption(rng) for _ in range(UNREAD_CAPTIONS)]
    with torch.autocast("cpu", torch.bfloat16):
        audio, text = model.audio_features(windows), model.text_features(texts)
    everything, text = audio.float(), text.float()
    audio_BD, empty_ED = everything[: len(scenes)], everything[len(scenes) :]
    text_BD, unread_UD = text[: len(scenes)], text[-UNREAD_CAPTIONS:]
    negatives_BKD = text[len(scenes) : -UNREAD_CAPTIONS].unflatten(0, (len(scenes), most))
    above = torch.cat([(unread_UD @ everything.T).flatten(), (text_BD @ empty_ED.T).flatten()]).clamp(min=0.0)
    loss = contrastive_loss(
        audio_BD,
        text_BD,
        negatives_BKD,
        known_BK,
        same_caption([scene.truth for scene in scenes]),
        model.clap.logit_scale_a.exp().clamp(max=100.0),
        empty_ED,
    )
    loss = loss + EMPTY_WEIGHT * above.square().mean()
    right = (audio_BD @ text_BD.T).argmax(1) == torch.arange(len(scenes))
    above_zero = above.square().mean().item()
    return loss, {
        "retrieved": right.float().mean().item(),
        "empty": above_zero,
        "scale": model.clap.logit_scale_a.exp().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--name", choices=sorted(SEEDS), required=True)
    parser.add_argument("--steps", type=int, default=LOOP.steps)
    parser.add_argument("--learning-rate", type=float, default=LOOP.learning_rate)
    parser.add_argument("--init", type=Path, help="continue from the CLAP model in this folder")
    arguments = parser.parse_args()
    seed = SEEDS[arguments.name]
    torch.manual_seed(seed)
    model = build(build_tokenizer())
    if arguments.init:
        start = load_clap(arguments.init)
        continue_embeddings(model.clap, start.clap, model.tokenizer, start.tokenizer, word_classes())
    text_config = model.clap.config.text_config
    reader = Parser(model.clap.text_model, text_config.hidden_size, text_config.pad_token_id)
    folder = arguments.work / arguments.name

    def parsing_loss(step: int) -> Tensor:
        return reader.loss(*parsing_batch(np.random.default_rng([seed, 1, step]), model.tokenizer, PARSED))

    train_part(reader, lambda step: (parsing_loss(step), {}), PARSING, folder / "parsing", title="parsing")

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        config = LONG if step % LONG_EVERY == 0 else SHORT
        scenes = [make_scene(seed, step * BATCH + i, config) for i in range(BATCH)]
        loss, figures = loss_of(model, scenes, np.random.default_rng([seed, step]))
        parsing = parsing_loss(PARSING.steps + step)
        return loss + PARSING_WEIGHT * parsing, figures | {"parsing": parsing.item()}

    both = nn.ModuleDict({"model": model, "parser": reader})
    config = replace(LOOP, steps=arguments.steps, learning_rate=arguments.learning_rate)
    train_part(both, loss_at, config, folder, title=arguments.name)
    model.eval().save(folder / "final")
    held_out = parsing_batch(np.random.default_rng([seed, 2]), model.tokenizer, 256, held_out=True)
    right = reader.accuracy(*held_out)
    print(f"held-out captions: {right:.4f} of the words labelled with the right event and time")


if __name__ == "__main__":
    main()
