"""A real pipeline, random and small: every test that needs a model builds this one.

About 80 thousand parameters; a clip of 0.64 s takes some tens of milliseconds on one thread.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderOobleck,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    LlamaConfig,
    LlamaForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PreTrainedTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)
from transformers import ClapModel as TransformersClapModel

from services.models.audiogen.codec import QuantisedAutoencoder
from services.models.audiogen.language_model import TextProjection
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.audiogen.sampling import TokenScheduler
from services.models.captioner.config import CaptionerConfig
from services.models.captioner.eat import EatConfig, EatEncoder
from services.models.captioner.model import Captioner, make_projector
from services.models.clap.model import ClapModel
from services.models.reward.model import RewardConfig, RewardModel
from services.models.state_dicts import quiet_loading
from services.models.tango.pipeline import TangoPipeline
from services.models.tango.schedulers import SD21_CONFIG
from services.models.tangoflux.denoiser import TangoFluxDenoiser
from services.models.tangoflux.pipeline import TangoFluxPipeline
from services.models.vocoder import GriffinLimVocoder

WORDS = (
    *("a", "the", "dog", "cat", "bird", "rain", "siren", "bell", "barks", "wails", "rings", "falls", "sings"),
    *("then", "and", "before", "after", "while", "followed", "by", ",", "."),
)
"""Every word that the tiny tokenizer knows."""


def tiny_tokenizer(length: int = 16, words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Word-level, lower-casing, one end-of-sequence token at the end."""
    special = ("<pad>", "</s>", "<unk>")
    vocabulary = {word: index for index, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_unet() -> UNet2DConditionModel:
    """Two levels, cross-attention on the inner one."""
    return UNet2DConditionModel(
        sample_size=(16, 8),
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
    )


def tiny_vae() -> AutoencoderKL:
    """Log-mel [1, T, 64] to latents [4, T / 4, 16]."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=0.9,
    )


def tiny_hifigan() -> SpeechT5HifiGan:
    """The neural vocoder at a width of 32 channels."""
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=16_000,
            upsample_initial_channel=32,
            upsample_rates=[5, 4, 4, 2],
            upsample_kernel_sizes=[11, 8, 8, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )


def tiny_text_encoder(vocabulary: int, width: int = 16) -> T5EncoderModel:
    """One layer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def tiny_adapter(
    folder: Path, pipeline: Any, *, seed: int = 0, rank: int = 4, targets: Sequence[str] = ("to_q", "to_v")
) -> Any:
    """Write an adapter of the denoiser by PEFT itself; return the denoiser merged with it, by PEFT."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    adapted = get_peft_model(deepcopy(pipeline.adaptable), settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder))
    return adapted.merge_and_unload()


PROFILES: Final = {
    "quality": {"num_inference_steps": 6, "guidance_scale": 3.0, "scheduler": "dpmsolver++"},
    "draft": {"num_inference_steps": 2, "guidance_scale": 1.0, "scheduler": "ddim"},
}
"""Profiles of `tiny_pipeline`, in its folder's form."""


def tiny_pipeline(
    seed: int = 0,
    *,
    vocoder: Literal["griffin-lim", "hifigan"] = "griffin-lim",
    text_length: int | None = 16,
    default_scheduler: str = "dpmsolver++",
) -> TangoPipeline:
    """Random weights that depend on `seed` alone. Latents [4, T, 16]; 0.64 s by default, 2.56 at most."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        vae = tiny_vae()
        # As quiet as real spectrograms, so that waveforms do not clip.
        torch.nn.init.constant_(vae.decoder.conv_out.bias, -5.0)
        return TangoPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_text_encoder(len(tokenizer)),
            unet=tiny_unet(),
            vae=vae,
            vocoder=GriffinLimVocoder(iterations=4, inversion_iterations=8)
            if vocoder == "griffin-lim"
            else tiny_hifigan(),
            scheduler=DDPMScheduler(**SD21_CONFIG),
            default_duration=0.64,
            max_duration=2.56,
            default_num_inference_steps=4,
            default_guidance_scale=3.0,
            default_scheduler=default_scheduler,
            text_length=text_length,
            profiles=PROFILES,
        )


def tiny_tangoflux(seed: int = 0, *, channels: int = 2, text_length: int | None = 16) -> TangoFluxPipeline:
    """Random weights of another family. Latents [40, 4]; durations as those of `tiny_pipeline`."""
    with torch.random.fork_rng(devices=[]), quiet_loading():
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        transformer = TangoFluxDenoiser(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
            max_duration=2.56,
        )
        return TangoFluxPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_text_encoder(len(tokenizer)),
            transformer=transformer,
            vae=AutoencoderOobleck(
                encoder_hidden_size=8,
                downsampling_ratios=[8, 8, 16],
                channel_multiples=[1, 1, 2],
                decoder_channels=8,
                decoder_input_channels=4,
                audio_channels=channels,
                sampling_rate=16_000,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            default_duration=0.64,
            max_duration=2.56,
            default_num_inference_steps=4,
            default_guidance_scale=3.0,
            latent_length=40,
            text_length=text_length,
        )


def tiny_audiogen(
    seed: int = 0, *, text_length: int | None = None, codes: int = 24, top_k: int = 250
) -> AudioGenPipeline:
    """Random weights of a language model of tokens: 4 codebooks, 25 frames a second."""
    with torch.random.fork_rng(devices=[]), quiet_loading():
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        vae = tiny_vae()
        config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
        codec = QuantisedAutoencoder(
            autoencoder=config, codebook_size=codes, components=8, latent_bins=16, hop_length=640
        )
        for weight in (codec.directions, codec.codebooks):
            torch.nn.init.normal_(weight, std=0.3)
        torch.nn.init.constant_(codec.vae.decoder.conv_out.bias, -5.0)
        decoder = MusicgenForCausalLM(
            MusicgenDecoderConfig(
                vocab_size=codes,
                num_codebooks=4,
                hidden_size=16,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=96,
                initializer_factor=0.3,
                scale_embedding=False,
                pad_token_id=codes,
                bos_token_id=codes,
                tie_word_embeddings=False,
            )
        )
        return AudioGenPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_text_encoder(len(tokenizer)),
            projection=TextProjection(16, 16),
            decoder=decoder,
            codec=codec,
            scheduler=TokenScheduler(special=codes, top_k=top_k),
            default_duration=0.64,
            max_duration=2.56,
            text_length=text_length,
        )


def tiny_clap_tokenizer() -> PreTrainedTokenizerFast:
    """As `tiny_tokenizer`, with RoBERTa's special tokens: padding is 1."""
    special = ("<s>", "<pad>", "</s>", "<unk>")
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_clap(seed: int = 0, *, padding: str = "repeatpad", fused: bool = False) -> ClapModel:
    """Random weights that depend on `seed` alone: 16 kHz, windows of 1 s, 16 dimensions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_clap_tokenizer()
        config = ClapConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "max_position_embeddings": 34,
                "layer_norm_eps": 1e-5,
            },
            audio_config={
                "spec_size": 64,
                "num_mel_bins": 32,
                "window_size": 4,
                "patch_embeds_hidden_size": 8,
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "num_attention_heads": [1, 2],
                "hidden_size": 16,
                "enable_fusion": fused,
                "fusion_type": "aff_2d" if fused else None,
            },
            projection_dim=16,
        )
        extractor = ClapFeatureExtractor(
            feature_size=32,
            sampling_rate=16_000,
            max_length_s=1,
            hop_length=130,
            frequency_min=50,
            frequency_max=8_000,
            truncation="fusion" if fused else "rand_trunc",
            padding=padding,
        )
        model = ClapModel(TransformersClapModel(config), tokenizer, extractor)
    return model.eval().requires_grad_(False)


def tiny_reward(clap: ClapModel, digest: str = "sha256:" + "0" * 64, seed: int = 0) -> RewardModel:
    """A random head on `clap`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = RewardConfig(
            text_width=clap.text_width,
            audio_width=clap.audio_width,
            clap_name="tiny-clap",
            clap_digest=digest,
            width=16,
            heads=2,
            layers=1,
            feedforward=16,
        )
        return RewardModel(clap, config).eval()


def tiny_caption_tokenizer() -> PreTrainedTokenizerFast:
    """As `tiny_tokenizer`, with Llama's special tokens: it begins with <s> and adds no end."""
    special = ("<unk>", "<s>", "</s>")
    words = (*special, *WORDS, *("USER", "ASSISTANT", ":", "Describe", "audio", "you", "hear"))
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_captioner(seed: int = 0, *, config: CaptionerConfig | None = None) -> Captioner:
    """Random weights that depend on `seed` alone: hears 0.64 s, beams 2 and 3, 8 tokens at most."""
    config = config or CaptionerConfig(
        prompt="USER: Describe the audio you hear. ASSISTANT:",
        frames=64,
        projector_width=16,
        beams=(2, 3),
        max_new_tokens=8,
    )
    eat = EatConfig(width=16, depth=1, heads=2, max_steps=8)
    tokenizer = tiny_caption_tokenizer()
    with torch.random.fork_rng(devices=[]), quiet_loading():
        torch.manual_seed(seed)
        language_model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
        tokenizer.pad_token = tokenizer.eos_token
        captioner = Captioner(
            EatEncoder(eat), make_projector(config, eat, 24), language_model, tokenizer, config
        )
    return captioner.eval().requires_grad_(False)
