"""Train the mini text encoder: a small T5 whose tokens encode which event a word names, and when.

    python -m training.mini.text_encoder --work build/mini
    python -m training.mini.text_encoder --work build/mini --init OLD/text_encoder   # an earlier edition

It is pretrained on parsing captions, token by token, and then frozen. Trained jointly with a denoiser it does
not learn word order (a swapped caption ends up nearly equal), and a sentence-level objective stalls.

With `--init`, the weights continue from an earlier edition's. A word that is new begins with the mean
embedding of its class, and the head is trained alone at first. So the tokens stay near those that a denoiser
was trained with.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training.loop.fit import LoopConfig
from training.mini.parsing import Parser, continue_embeddings, parsing_batch, word_tokenizer
from training.mini.parts import part_parser, train_part
from training.soundworld.captions import word_classes

SEED = 202
TEXT_LENGTH = 32
"""Tokens a prompt is padded to; the longest captions of the grammar have 26."""
BATCH = 64
LOOP = LoopConfig(steps=2_500, batch=BATCH, learning_rate=1.5e-3, warmup=100, decay=0.25, ema=0.99)


HEAD_STEPS = 200
"""Steps of the head alone, with `--init`."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar, lower case; T5's special tokens and its ``</s>`` at the end."""
    return word_tokenizer(("<pad>", "</s>", "<unk>"), TEXT_LENGTH)


def build(vocabulary: int) -> T5EncoderModel:
    """The architecture of FLAN-T5's encoder, 128 wide and three layers deep."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=True,
        )
    )


def main() -> None:
    parser = part_parser(__doc__, LOOP.steps)
    parser.add_argument("--init", type=Path, help="continue from the text encoder in this folder")
    parser.add_argument("--learning-rate", type=float, default=LOOP.learning_rate)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    encoder = build(len(tokenizer))
    model = Parser(encoder, encoder.config.d_model, tokenizer.pad_token_id)
    folder = arguments.work / "text_encoder"

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        return model.loss(*parsing_batch(np.random.default_rng([SEED, step]), tokenizer, BATCH)), {}

    if arguments.init:
        old = T5EncoderModel.from_pretrained(arguments.init / "final")
        known = PreTrainedTokenizerFast.from_pretrained(arguments.init / "tokenizer")
        continue_embeddings(encoder, old, tokenizer, known, word_classes())
        encoder.requires_grad_(False)
        head = replace(LOOP, steps=HEAD_STEPS, learning_rate=1e-2, warmup=10)
        train_part(model, loss_at, head, folder / "head", title="head")
        encoder.requires_grad_(True)
    config = replace(LOOP, steps=arguments.steps, learning_rate=arguments.learning_rate)
    train_part(model, loss_at, config, folder, title="text encoder")
    model.eval()
    right = model.accuracy(
        *parsing_batch(np.random.default_rng([SEED, 10_000_000]), tokenizer, BATCH, held_out=True)
    )
    print(f"held-out captions: {right:.4f} of the words labelled with the right event and time")
    encoder.save_pretrained(folder / "final", safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main()
