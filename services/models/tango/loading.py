"""Load a `TangoPipeline` from its model folder."""

from pathlib import Path
from typing import Final, cast

import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from services.models.pipelines import Architecture, Builder
from services.models.tango.distilled import student_of
from services.models.tango.pipeline import TangoPipeline, velocity
from services.models.vocoder import GriffinLimVocoder

TEXT_ENCODERS: Final = (
    "T5EncoderModel",
    "BertModel",
    "DistilBertModel",
    "MPNetModel",
    "ModernBertModel",
    "RobertaModel",
    "XLMRobertaModel",
)
"""Permitted classes of text encoders: those of transformers whose first output is the tokens' states."""


def _text_encoder(name: str) -> Builder:
    model = getattr(transformers, name)
    return lambda config: cast(transformers.PreTrainedModel, model(model.config_class(**config)))


TANGO: Final = Architecture(
    pipeline=TangoPipeline,
    parts={
        "text_encoder": {f"transformers.{name}": _text_encoder(name) for name in TEXT_ENCODERS},
        "unet": {"diffusers.UNet2DConditionModel": UNet2DConditionModel.from_config},
        "vae": {"diffusers.AutoencoderKL": AutoencoderKL.from_config},
        "vocoder": {
            "transformers.SpeechT5HifiGan": lambda config: SpeechT5HifiGan(SpeechT5HifiGanConfig(**config)),
            "services.models.vocoder.GriffinLimVocoder": GriffinLimVocoder.from_config,
        },
    },
    schedulers=(
        "diffusers.DDPMScheduler",
        "diffusers.DDIMScheduler",
        "diffusers.DPMSolverMultistepScheduler",
        "diffusers.UniPCMultistepScheduler",
    ),
    denoiser="unet",
    denoiser_class=UNet2DConditionModel,
    denoise=velocity,
    student=student_of,
    objective="v_prediction",
    encoders=("vae",),
    decoders=("vae", "vocoder"),
    offloadable=("text_encoder", "vae", "vocoder"),
    tags=("latent-diffusion", "tango"),
)


def load_tango(
    folder: Path, *, device: str = "cpu", dtype: str = "float32", decoder_dtype: str = "float32"
) -> TangoPipeline:
    """Load a Tango model, for programs that use its parts; see `architectures.load_generator`."""
    pipeline = TANGO.load(folder, device=device, dtype=dtype, decoder_dtype=decoder_dtype)
    return cast(TangoPipeline, pipeline)
