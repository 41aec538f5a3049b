"""What a user would take instead on the same GPU: diffusers' pipelines, with random weights.

Released configurations of AudioLDM 2 (cvssp/audioldm2) and Stable Audio Open 1.0, as diffusers' classes and
conversion scripts state them. Prompts come as random embeddings of the released shapes: the text encoders run
once per clip, which no figure depends on much, and their tokenizers can't be had without a download.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from transformers import (
    ClapConfig,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from services.models.tango.checkpoint import HIFIGAN_CONFIG

SECONDS: Final = 10.24
"""Length of each clip. Stable Audio denoises all of its 47.6 s, whatever is asked for."""
TOKENS: Final = 32
Render = Callable[[int, int], Any]
"""Makes a number of clips in a number of steps."""


def audioldm2(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Render:
    """Return AudioLDM 2: a UNet of 347M parameters on [C, T, M] latents as Tango's."""
    channels, widths = ((128, 256, 512), (128, 256, 384, 640)) if not tiny else ((8, 8, 8), (32, 32, 32, 32))
    text, generated = (1024, 768) if not tiny else (16, 8)
    with torch.device(device):
        pipeline = AudioLDM2Pipeline(
            vae=AutoencoderKL(
                in_channels=1,
                out_channels=1,
                latent_channels=8,
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                layers_per_block=2,
                norm_num_groups=8 if tiny else 32,
            ),
            unet=AudioLDM2UNet2DConditionModel(
                in_channels=8,
                out_channels=8,
                block_out_channels=widths,
                cross_attention_dim=[[None, generated, text]] * 4,
                down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
                up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
                layers_per_block=2,
            ),
            vocoder=SpeechT5HifiGan(
                SpeechT5HifiGanConfig(
                    **HIFIGAN_CONFIG,
                    model_in_dim=64,
                    sampling_rate=16_000,
                    upsample_initial_channel=32 if tiny else 1024,
                )
            ),
            projection_model=AudioLDM2ProjectionModel(4, 4, 8),
            **_smallest_text_parts(),
            tokenizer=None,
            tokenizer_2=None,
            feature_extractor=None,
            scheduler=DDIMScheduler(beta_schedule="scaled_linear"),
        )
    pipeline.to(device, dtype).set_progress_bar_config(disable=True)

    def render(clips: int, steps: int) -> Any:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        mask = torch.ones(clips, TOKENS, device=device, dtype=torch.long)
        return pipeline(
            prompt_embeds=torch.randn(clips, TOKENS, text, **options),
            negative_prompt_embeds=torch.randn(clips, TOKENS, text, **options),
            generated_prompt_embeds=torch.randn(clips, 8, generated, **options),
            negative_generated_prompt_embeds=torch.randn(clips, 8, generated, **options),
            attention_mask=mask,
            negative_attention_mask=mask,
            audio_length_in_s=1.28 if tiny else SECONDS,
            num_inference_steps=steps,
            guidance_scale=3.5,
            output_type="pt",
        )

    return render


def stable_audio(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Render:
    """Return Stable Audio Open 1.0: a transformer of 1,057M parameters, 44.1 kHz stereo."""
    transformer: dict[str, Any] = {}
    codec: dict[str, Any] = {}
    width = 768
    if tiny:
        width = 16
        transformer = {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": width,
            "cross_attention_input_dim": width,
            "global_states_input_dim": 2 * width,
        }
        codec = {
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
            "decoder_channels": 4,
            "decoder_input_channels": 4,
        }
    with torch.device(device):
        pipeline = StableAudioPipeline(
            vae=AutoencoderOobleck(**codec),
            transformer=StableAudioDiTModel(**transformer),
            projection_model=StableAudioProjectionModel(
                text_encoder_dim=width, conditioning_dim=width, min_value=0, max_value=512
            ),
            text_encoder=T5EncoderModel(_SMALLEST_T5),
            tokenizer=None,
            scheduler=EDMDPMSolverMultistepScheduler(
                sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type="v_prediction"
            ),
        )
    pipeline.to(device, dtype).set_progress_bar_config(disable=True)

    def render(clips: int, steps: int) -> Any:
        embeddings = torch.randn(clips, TOKENS, width, device=device, dtype=dtype)
        return pipeline(
            prompt_embeds=embeddings,
            attention_mask=torch.ones(clips, TOKENS, device=device, dtype=torch.long),
            negative_prompt_embeds=embeddings,
            negative_attention_mask=torch.ones(clips, TOKENS, device=device, dtype=torch.long),
            audio_end_in_s=0.002 if tiny else SECONDS,
            num_inference_steps=steps,
        )

    return render


PEERS: Final[dict[str, Callable[..., Render]]] = {
    "AudioLDM 2": audioldm2,
    "Stable Audio Open 1.0": stable_audio,
}

_SMALLEST_T5: Final = T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=8)


def _smallest_text_parts() -> dict[str, Any]:
    """Return text encoders of the right classes that are not run."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio = {"patch_embeds_hidden_size": 8, "depths": [1], "num_attention_heads": [2], "hidden_size": 8}
    return {
        "text_encoder": ClapModel(
            ClapConfig(text_config={**small, "vocab_size": 8}, audio_config=audio, projection_dim=8)
        ),
        "text_encoder_2": T5EncoderModel(_SMALLEST_T5),
        "language_model": GPT2LMHeadModel(
            GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
        ),
    }
