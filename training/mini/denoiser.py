"""Train a mini denoiser on cached latents: v-prediction on Stable Diffusion 2.1's schedule, as Tango.

    python -m training.mini.denoiser --name trunk --captions web --steps 6000 --decay 0
    python -m training.mini.denoiser --name mini --captions true --init build/mini/trunk/final

The loss is not weighted by min-SNR, unlike upstream's: for v-prediction that weight goes to zero with the
signal, and the order of events is decided where there is hardly any.

Shape legend: B batch, C latent channels, T latent frames, F latent mel bins, L text tokens, D text width.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from training.loop.fit import Evaluation, LoopConfig
from training.mini.latents import LatentSet, load_shards
from training.mini.parts import train_part
from training.mini.text_encoder import TEXT_LENGTH
from training.soundworld.captions import (
    TRUE_CAPTIONS,
    WEB_CAPTIONS,
    CaptionNoise,
    CaptionTruth,
    corrupt,
    swap,
    write_caption,
)
from training.soundworld.scenes import split_of

SEED = 505
BATCH = 32
CONDITION_DROPOUT = 0.1
"""Share of the prompts replaced by the empty one, for classifier-free guidance."""
BLANK_SHARE, BLANK_FROM = 0.25, 900
"""Share of a batch with no signal left, and its first timestep. Solvers of other spacings begin anywhere
from there on."""
LATE_SHARE, LATE_FROM = 0.25, 800
"""Share of a batch at late timesteps, where the layout of a clip is decided."""
LONG_EVERY = 6
"""Every this many steps the batch has clips of 5.12 s, half as many."""
LOOP = LoopConfig(steps=20_000, batch=BATCH, learning_rate=1e-3, warmup=200, decay=0.3, ema=0.999)
NOISES: dict[str, CaptionNoise] = {"true": TRUE_CAPTIONS, "web": WEB_CAPTIONS}


def build(cross_attention_dim: int) -> UNet2DConditionModel:
    """Tango's denoiser, narrow: cross-attention at a half and a quarter of the latents' resolution."""
    return UNet2DConditionModel(
        sample_size=(32, 8),
        in_channels=16,
        out_channels=16,
        block_out_channels=(64, 96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def schedule() -> DDPMScheduler:
    """Return Stable Diffusion 2.1's noise schedule, as Tango's."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
    )


class TextSide:
    """The frozen text encoder: captions to embeddings [B, L, D] and mask [B, L]."""

    def __init__(self, folder: Path, *, length: int | None = TEXT_LENGTH) -> None:
        """Load it from `folder`; prompts are padded to `length` tokens, None: to the longest of a call."""
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.encoder = T5EncoderModel.from_pretrained(folder / "final").eval()
        self.length = length

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings and mask, padded as when serving."""
        padding = "max_length" if self.length else "longest"
        tokens = self.tokenizer(captions, padding=padding, max_length=self.length, return_tensors="pt")
        mask_BL = tokens["attention_mask"]
        hidden = self.encoder(input_ids=tokens["input_ids"], attention_mask=mask_BL).last_hidden_state
        return hidden, mask_BL.bool()


def training_caption(truth: CaptionTruth, noise: CaptionNoise, rng: np.random.Generator) -> str:
    """Return a wording of the training split, wrong with `noise`'s probability, empty with the dropout's."""
    if rng.uniform() < CONDITION_DROPOUT:
        return ""
    described = corrupt(truth, noise, rng)
    while True:
        caption = write_caption(described, rng)
        if split_of(caption) == "train":
            return caption


@dataclass(frozen=True, kw_only=True, slots=True)
class Noising:
    """Noising of the clips of a batch."""

    timesteps_B: Tensor
    """int64, 0 to 999."""
    noise_BCTF: Tensor
    blank_B: Tensor
    """Bool: nothing of the clip is left, as at the start of inference."""


def _stratified(rng: np.random.Generator, count: int, low: int, high: int) -> NDArray[np.int64]:
    """One number from each of `count` equal parts of [low, high)."""
    parts = (np.arange(count) + rng.uniform(size=count)) / max(1, count)
    return (low + parts * (high - low)).astype(np.int64)


def draw_noising(rng: np.random.Generator, shape: tuple[int, ...]) -> Noising:
    """Timesteps, a share of them near the end and a share blank, and unit noise of `shape` [B, C, T, F].

    Stable Diffusion's schedule ends with 0.5 % of the signal's power left. Over the thousands of values of a
    clip that is enough to read its whole layout from, so that a denoiser need not learn it from the text; but
    inference begins with noise alone. The blank share trains on just that (compare arXiv 2305.08891).
    """
    count = shape[0]
    blank, late = round(BLANK_SHARE * count), round(LATE_SHARE * count)
    timesteps = np.concatenate(
        [
            _stratified(rng, blank, BLANK_FROM, 1000),
            _stratified(rng, late, LATE_FROM, 1000),
            _stratified(rng, count - blank - late, 0, 1000),
        ]
    )
    return Noising(
        timesteps_B=torch.from_numpy(timesteps),
        noise_BCTF=torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
        blank_B=torch.arange(count) < blank,
    )


def v_error(unet: nn.Module, clean_BCTF: Tensor, noising: Noising, text: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error of the predicted velocity, one value per clip: [B]."""
    ddpm, noise, timesteps = schedule(), noising.noise_BCTF, noising.timesteps_B
    noisy = ddpm.add_noise(clean_BCTF, noise, timesteps)
    noisy = torch.where(noising.blank_B[:, None, None, None], noise, noisy)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(
            noisy, timesteps, encoder_hidden_states=text[0], encoder_attention_mask=text[1]
        ).sample
    target = ddpm.get_velocity(clean_BCTF, noise, timesteps)
    return (predicted.float() - target).square().mean((1, 2, 3))


@torch.no_grad()
def order_probe(unet: nn.Module, data: LatentSet, text: TextSide, count: int = 64) -> dict[str, float]:
    """Return the errors from blank latents with right and with swapped captions: the gap measures order."""
    rng = np.random.default_rng([SEED, 1])
    picked = [i for i, t in enumerate(data.truths) if t.relation == "then"][:count]
    clean = data.latents_BCTF[picked].float()
    noising = Noising(
        timesteps_B=torch.full((len(picked),), 990),
        noise_BCTF=torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)),
        blank_B=torch.ones(len(picked), dtype=torch.bool),
    )
    right = [write_caption(data.truths[i], rng) for i in picked]
    swapped = [write_caption(swap(data.truths[i], rng), rng) for i in picked]
    errors = [float(v_error(unet, clean, noising, text(captions)).mean()) for captions in (right, swapped)]
    return {"order_right": errors[0], "order_swapped": errors[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--name", required=True)
    parser.add_argument("--captions", choices=sorted(NOISES), default="true")
    parser.add_argument("--init", type=Path, help="start from the denoiser in this folder")
    parser.add_argument("--steps", type=int, default=LOOP.steps)
    parser.add_argument("--learning-rate", type=float, default=LOOP.learning_rate)
    parser.add_argument("--decay", type=float, default=LOOP.decay, help="share of the steps; 0 for a trunk")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    text = TextSide(arguments.work / "text_encoder")
    short = load_shards(arguments.work / "latents", "short-*.npz")
    long = load_shards(arguments.work / "latents", "long-*.npz")
    unet = (
        UNet2DConditionModel.from_pretrained(arguments.init)
        if arguments.init
        else build(text.encoder.config.d_model)
    )
    caption_noise = NOISES[arguments.captions]

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([SEED, step])
        data, count = (long, BATCH // 2) if step % LONG_EVERY == LONG_EVERY - 1 else (short, BATCH)
        picked = rng.integers(0, len(data.truths), count)
        clean = data.latents_BCTF[picked].float()
        captions = [training_caption(data.truths[i], caption_noise, rng) for i in picked]
        return v_error(unet, clean, draw_noising(rng, clean.shape), text(captions)).mean(), {}

    folder = arguments.work / arguments.name
    config = replace(
        LOOP, steps=arguments.steps, learning_rate=arguments.learning_rate, decay=arguments.decay
    )
    probe = Evaluation(run=lambda module: order_probe(module, short, text), every=500, watched=None)
    train_part(unet, loss_at, config, folder, title=arguments.name, evaluation=probe)
    unet.save_pretrained(folder / "final", safe_serialization=True)


if __name__ == "__main__":
    main()
