"""Train the mini captioner: a projector and a small Llama that continue the encoder's tokens with a caption.

    python -m training.mini.captioner --work build/mini

As in SLAM-AAC the encoder is frozen, so its tokens are computed once. Here the language model learns too,
from scratch: released captioners start from one that knows English. It learns one plain wording of each
event. The tokenizer knows all words of the grammar, but adapters on the frozen language model can't teach it
the others (docs/training.md).

Shape legend: B batch, E encoder tokens of a clip, D width.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Regex, decoders
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.api.reading import EVENTS
from services.models.captioner.eat import EatEncoder
from services.models.captioner.filterbank import FilterBank
from services.models.captioner.model import Captioner, fit_frames, make_projector
from training.loop.fit import LoopConfig
from training.mini.captioner_clips import Sound, load_sounds, scene_sound
from training.mini.captioner_encoder import CAPTIONER, ENCODER, Detector, at_level
from training.mini.parsing import word_tokenizer
from training.mini.parts import train_part
from training.soundworld.captions import CaptionTruth, plain_caption, words
from training.soundworld.reading import grammar_events

SEED = 1_414
BATCH = 16
LOOP = LoopConfig(steps=10_000, batch=BATCH, learning_rate=3e-3, warmup=50, decay=0.4, ema=0.98)
SCENES, LONG_SCENES = 10_240, 6_144
"""Scenes of 2.56 s and of 5.12 s whose tokens are computed."""
CAPTION_TOKENS = 48
"""Most tokens of a caption."""
ENCODED = 32
"""Clips that are encoded at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedClips:
    """The frozen encoder's tokens of clips."""

    tokens_BED: Tensor
    """float16."""
    truths: list[CaptionTruth]


def build_tokenizer(prompt: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word of the grammar and of the prompt: ``<s> user : … </s>``."""
    asked = dict.fromkeys(part for word in prompt.lower().split() for part in _marks(word))
    further = [word for word in asked if word not in words()]
    special = ("<pad>", "<s>", "</s>", "<unk>", *further)
    tokenizer = word_tokenizer(special, CAPTION_TOKENS + len(asked))
    # No space before a comma; and without the one that the tokenizer makes of the prompt's last colon.
    first = decoders.Replace(Regex("^, *"), "")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), first])
    return tokenizer


def build(tokenizer: PreTrainedTokenizerFast, encoder: EatEncoder) -> Captioner:
    """Return a captioner with a new projector and a new Llama of 2 layers."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    projector = make_projector(CAPTIONER, encoder.config, model.config.hidden_size)
    return Captioner(encoder, projector, model, tokenizer, CAPTIONER)


def load_encoder(work: Path) -> EatEncoder:
    """Load the encoder of `training.mini.captioner_encoder`."""
    detector = Detector(EatEncoder(ENCODER))
    detector.load_state_dict(load_file(work / "captioner" / "encoder" / "detector.safetensors"))
    return detector.encoder.eval().requires_grad_(False)


def training_sounds(work: Path) -> Iterator[Sound]:
    """Yield all clips: scenes, then rebuilt and generated ones."""
    for index in range(SCENES + LONG_SCENES):
        yield scene_sound(SEED, index, long=index >= SCENES)
    folder = work / "captioner" / "clips"
    yield from load_sounds(folder, "rebuilt")
    yield from load_sounds(folder, "generated")


@torch.inference_mode()
def encoded_clips(work: Path, encoder: EatEncoder) -> EncodedClips:
    """Return the encoder's tokens of all clips, computed once and kept in ``tokens.pt``."""
    path = work / "captioner" / "tokens.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        truths = [CaptionTruth(classes=tuple(names), relation=relation) for names, relation in kept["truths"]]
        return EncodedClips(tokens_BED=kept["tokens"], truths=truths)
    filterbank, parts, mels, truths = FilterBank(), [], [], []
    sounds = enumerate(training_sounds(work))
    for index, sound in tqdm(sounds, desc="tokens", unit="clip", mininterval=5.0):
        levelled = at_level(sound, np.random.default_rng([SEED, 1, index]))
        mels.append(fit_frames(filterbank(torch.from_numpy(levelled.waveform_N)), CAPTIONER))
        truths.append(sound.truth)
        if len(mels) == ENCODED:
            parts.append(encoder(torch.stack(mels)).half())
            mels = []
    tokens_BED = torch.cat(parts)
    truths = truths[: len(tokens_BED)]
    torch.save({"tokens": tokens_BED, "truths": [(t.classes, t.relation) for t in truths]}, path)
    return EncodedClips(tokens_BED=tokens_BED, truths=truths)


def caption_loss(captioner: Captioner, tokens_BED: Tensor, captions: Sequence[str]) -> Tensor:
    """Return the loss of captions of encoder tokens."""
    embeddings, labels, mask = captioner.layout(captioner.projector(tokens_BED), captions)
    output = captioner.language_model(inputs_embeds=embeddings, attention_mask=mask.long(), labels=labels)
    loss: Tensor = output.loss
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--steps", type=int, default=LOOP.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    encoder = load_encoder(arguments.work)
    clips = encoded_clips(arguments.work, encoder)
    captioner = build(build_tokenizer(CAPTIONER.prompt), encoder)
    captioner.projector.requires_grad_(True)
    captioner.language_model.requires_grad_(True)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        picks = np.random.default_rng([SEED, 2, step]).integers(len(clips.truths), size=BATCH)
        captions = [plain_caption(clips.truths[i]) for i in picks]
        return caption_loss(captioner, clips.tokens_BED[picks].float(), captions), {}

    folder = arguments.work / "captioner" / "model"
    train_part(captioner, loss_at, replace(LOOP, steps=arguments.steps), folder, title="captioner")
    captioner.eval().save_pretrained(folder / "final")
    (folder / "final" / EVENTS).write_text(grammar_events(), encoding="utf-8")


def _marks(word: str) -> list[str]:
    """Return a word and its punctuation apart, as the tokenizer does."""
    stem = word.rstrip(".:,")
    return [part for part in (stem, *word[len(stem) :]) if part]


if __name__ == "__main__":
    main()
