"""The complete pipeline folder that a denoiser's training starts from: its denoiser is untrained."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from services.models.hifigan import VocoderMel
from services.models.manifest import write_manifest
from services.models.ready_made import TextSide
from services.models.state_dicts import quiet_loading
from services.models.tango.pipeline import TangoPipeline
from services.models.tango.schedulers import SD21_CONFIG
from services.models.writing import replaced_folder
from training.pretraining.config import DenoiserArchitecture, NewModel

VERSION = "0"
"""Version of the untrained model."""


def build_denoiser(config: DenoiserArchitecture, channels: int, text_width: int) -> Any:
    """Return an untrained denoiser of latents with `channels`, for text states of `text_width`."""
    levels = len(config.widths)
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=config.heads,  # despite its name, the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )


def write_start(
    config: NewModel, vae: Any, vocoder: Any, mel: VocoderMel, text: TextSide, folder: Path
) -> None:
    """Write the folder. Raises `OutputError`, or `ModelFormatError` where the parts do not fit together."""
    torch.manual_seed(config.denoiser.loop.seed)
    unet = build_denoiser(config.architecture, vae.config.latent_channels, text.encoder.config.hidden_size)
    pipeline = TangoPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.encoder,
        unet=unet,
        vae=vae,
        vocoder=vocoder,
        scheduler=DDPMScheduler(**SD21_CONFIG),
        default_duration=config.scenes.duration,
        max_duration=2 * config.scenes.duration,
        default_num_inference_steps=config.num_inference_steps,
        default_guidance_scale=config.guidance_scale,
        default_scheduler="dpmsolver++",
        sampling_rate=mel.sampling_rate,
        hop_length=mel.hop_length,
        mel_bins=mel.mel_bins,
        text_length=config.text_length,
        maximum_hertz=mel.maximum_hertz,
    )
    with replaced_folder(folder) as temporary, quiet_loading():
        pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
        write_manifest(temporary, name=config.name, version=VERSION, license=config.license)
