"""Train the mini text encoder: a small T5 whose tokens encode which event a word names, and when.

    python -m training.mini.text_encoder --work build/mini

It is pretrained on parsing captions, token by token, and then frozen. Trained jointly with a denoiser it does
not learn word order (a swapped caption ends up nearly equal), and a sentence-level objective stalls.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training.loop.fit import LoopConfig
from training.mini.parsing import Parser, parsing_batch, word_tokenizer
from training.mini.parts import part_arguments, train_part

SEED = 202
TEXT_LENGTH = 24
"""Tokens a prompt is padded to; the longest caption of the grammar has 20."""
BATCH = 64
LOOP = LoopConfig(steps=2_500, batch=BATCH, learning_rate=1.5e-3, warmup=100, decay=0.25, ema=0.99)


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
    arguments = part_arguments(__doc__, LOOP.steps)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    encoder = build(len(tokenizer))
    model = Parser(encoder, encoder.config.d_model, tokenizer.pad_token_id)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        return model.loss(*parsing_batch(np.random.default_rng([SEED, step]), tokenizer, BATCH)), {}

    folder = arguments.work / "text_encoder"
    train_part(model, loss_at, replace(LOOP, steps=arguments.steps), folder, title="text encoder")
    model.eval()
    right = model.accuracy(
        *parsing_batch(np.random.default_rng([SEED, 10_000_000]), tokenizer, BATCH, held_out=True)
    )
    print(f"held-out captions: {right:.4f} of the words labelled with the right event and time")
    encoder.save_pretrained(folder / "final", safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main()
