"""Settings of `milonga train new`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from services.models.ready_made import HIFIGAN, MINILM
from training.data.recorded_scenes import RecordedSceneConfig
from training.data.splits import SplitConfig
from training.finetuning.sft import SftTraining
from training.loop.checks import Count, Factor, Range, check_ranges
from training.loop.fit import LoopConfig
from training.objectives.noising import NoisingConfig
from training.pretraining.autoencoder import AutoencoderTraining


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserArchitecture:
    """Tango's denoiser, narrow: cross-attention at every level but the first."""

    widths: tuple[int, ...] = (64, 128, 192)
    """Channels of each level; each level but the last halves time and frequency."""
    heads: Count = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewModel:
    """A generator trained from nothing on recordings."""

    name: str = "my-model"
    """Name of the model, in its manifest and of its folder."""
    data: Path = Path("my-sounds")
    """The recordings (`training.data.recordings`)."""
    audio_root: Path | None = None
    """Folder that relative paths of audio start from; None: the list's folder."""
    minutes: Annotated[float, Range(0, 100_000)] = 60.0
    """Minutes for the two trainings on this machine, which decide their steps; 0: the loops' own steps. What
    comes before and after them takes some minutes more."""
    autoencoder_share: Annotated[float, Range(0.05, 0.95)] = 0.35
    """Share of the minutes for the autoencoder."""
    split: SplitConfig = field(default_factory=SplitConfig)
    scenes: RecordedSceneConfig = field(
        default_factory=lambda: RecordedSceneConfig(duration=2.56, single=0.3, sequence=0.5)
    )
    """Scenes are mixed at the vocoder's sampling rate."""
    count: Count = 4_000
    """Number of scenes that the denoiser learns from."""
    autoencoder_count: Count = 1_500
    """Number of scenes that the autoencoder learns from."""
    vocoder: str = HIFIGAN
    """hifigan, the installed universal one; or the path of a HiFi-GAN checkpoint."""
    text_encoder: str = MINILM
    """minilm, the installed one; or a folder of transformers."""
    text_length: Annotated[int, Range(4, 512)] = 32
    """Tokens that prompts are padded to; longer ones are truncated."""
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    architecture: DenoiserArchitecture = field(default_factory=DenoiserArchitecture)
    denoiser: SftTraining = field(
        default_factory=lambda: SftTraining(
            name="denoiser",
            loop=LoopConfig(
                steps=12_000,
                batch=24,
                learning_rate=1e-3,
                warmup=200,
                decay=0.3,
                ema=0.999,
                mixed_precision="bf16",
            ),
            noising=NoisingConfig(blank=0.15, late=0.2, condition_dropout=0.1),
            weights="float16",
        )
    )
    """Training of the denoiser; its start and its data are those of this model."""
    num_inference_steps: Count = 25
    """Default of the model."""
    guidance_scale: Factor = 3.0
    """Default of the model."""
    least_clips: Count = 8
    """Readable clips of the training part below which nothing is trained."""
    license: str = "unknown"
    """Licence of the weights, for the manifest."""

    def __post_init__(self) -> None:
        check_ranges(self)
