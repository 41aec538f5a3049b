"""Train the mini AudioGen's language model on the codec's tokens of cached latents.

    python -m training.mini.audiogen --work build/mini

As upstream: codes in the delay pattern, the text by cross-attention to projected T5 embeddings whose padded
rows are zero, 10 % of the prompts replaced by zeros for classifier-free guidance. The text encoder is frozen.

Shape legend: B clips, K codebooks, S steps, L text tokens, D text width, V codes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

from services.models.audiogen.codec import QuantisedAutoencoder
from services.models.audiogen.language_model import TextProjection, token_logits
from services.models.audiogen.pattern import delayed, is_code
from training.loop.fit import LoopConfig
from training.mini.denoiser import TextSide, training_caption
from training.mini.latents import LatentSet, load_shards
from training.mini.parts import train_part
from training.soundworld.captions import TRUE_CAPTIONS

SEED = 1_717
BATCH = 16
LOOP = LoopConfig(steps=20_000, batch=BATCH, learning_rate=2e-3, warmup=150, decay=0.3, ema=0.995)
CODEBOOK_WEIGHTS = (0.55, 0.2, 0.15, 0.1)
"""Weights of the codebooks' losses: the first decides which event sounds, and is the most predictable."""


class TokenModel(nn.Module):
    """The language model and the projection of its text: what is trained."""

    def __init__(self, text_width: int, codebook_size: int, codebooks: int) -> None:
        super().__init__()
        config = MusicgenDecoderConfig(
            vocab_size=codebook_size,
            num_codebooks=codebooks,
            hidden_size=144,
            ffn_dim=288,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            scale_embedding=False,
            pad_token_id=codebook_size,
            bos_token_id=codebook_size,
            tie_word_embeddings=False,
        )
        self.decoder = MusicgenForCausalLM(config)
        self.projection = TextProjection(text_width, config.hidden_size)

    def loss(self, sequence_BKS: Tensor, embeds_BLD: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted cross-entropy of each step's codes given the earlier ones."""
        logits_BKSV = token_logits(self.decoder, sequence_BKS[..., :-1], self.projection(embeds_BLD))
        counted_KS = is_code(sequence_BKS.shape[2], sequence_BKS.shape[1])[:, 1:]
        by_codebook = [
            cross_entropy(
                logits_BKSV[:, k, counted].flatten(0, 1), sequence_BKS[:, k, 1:][:, counted].flatten()
            )
            for k, counted in enumerate(counted_KS)
        ]
        total = torch.stack(by_codebook) @ torch.tensor(CODEBOOK_WEIGHTS)
        return total, {f"codebook_{k}": loss.item() for k, loss in enumerate(by_codebook)}


@torch.no_grad()
def tokens_of(data: LatentSet, codec: QuantisedAutoencoder) -> Tensor:
    """Return the codes [B, K, T] of cached latents."""
    parts = [codec.quantise(part.float()) for part in data.latents_BCTF.split(1_024)]
    return torch.cat(parts).short()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--steps", type=int, default=LOOP.steps)
    parser.add_argument("--horizon", type=int, default=0, help="step at which the rate is zero; 0: the last")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    text = TextSide(arguments.work / "text_encoder")
    codec = QuantisedAutoencoder.from_pretrained(arguments.work / "codec" / "final").eval()
    data = load_shards(arguments.work / "latents", "short-*.npz")
    codes_BKT = tokens_of(data, codec)
    codebooks, codebook_size = codec.config.num_quantizers, codec.config.codebook_size
    model = TokenModel(text.encoder.config.d_model, codebook_size, codebooks)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([SEED, step])
        picked = rng.integers(0, len(data.truths), BATCH)
        captions = [training_caption(data.truths[i], TRUE_CAPTIONS, rng) for i in picked]
        embeds_BLD, mask_BL = text(captions)
        said_B = torch.tensor([bool(caption) for caption in captions])
        embeds_BLD = embeds_BLD * (mask_BL & said_B[:, None])[..., None]
        return model.loss(delayed(codes_BKT[picked].long(), codebook_size), embeds_BLD)

    folder = arguments.work / "audiogen"
    config = replace(LOOP, steps=arguments.steps, horizon=arguments.horizon)
    train_part(model, loss_at, config, folder, title="audiogen")
    model.decoder.save_pretrained(folder / "final" / "decoder", safe_serialization=True)
    model.projection.save_pretrained(folder / "final" / "projection", safe_serialization=True)


if __name__ == "__main__":
    main()
