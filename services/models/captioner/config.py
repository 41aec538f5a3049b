"""The settings of a captioner: `config.json` of its model folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.captioner.filterbank import FRAME_SHIFT, SAMPLING_RATE
from services.models.folders import build_dataclass, read_json

CLASS_NAME: Final = "SlamCaptioner"
"""`_class_name` in `config.json`."""
CONFIG_NAME: Final = "config.json"
PROMPT: Final = "USER: Describe the audio you hear. \n ASSISTANT:"
"""What SLAM-AAC was trained with: its template around its prompt, after which the data set puts a space."""
PATCH: Final = 16
"""Frames and mel bins of an encoder's patch."""
MAX_BEAMS: Final = 16
MAX_TOKENS: Final = 1_024
"""Limits of a beam size and of a caption's tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerConfig:
    """Settings around the three models; the defaults are SLAM-AAC's (SLAM-LLM a68e78f, ``slam_aac``)."""

    prompt: str = PROMPT
    """Text between the audio tokens and the caption."""
    frames: int = 1_024
    """Mel frames of a clip: shorter ones are padded, longer ones cut. A multiple of 16."""
    group: int = 5
    """Encoder tokens that the projector joins to one audio token (k)."""
    projector_width: int = 2_048
    """Width of the projector's hidden layer."""
    mel_mean: float = -4.268
    """Mean of the log-mel energies (AudioSet)."""
    mel_deviation: float = 4.569
    """Their standard deviation; they are divided by twice that."""
    beams: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Beam sizes of the candidates."""
    max_new_tokens: int = 200
    """Most tokens of a caption."""

    def __post_init__(self) -> None:
        limits = (
            ("frames", self.frames, PATCH, 65_536),
            ("group", self.group, 1, 64),
            ("projector_width", self.projector_width, 1, 65_536),
            ("max_new_tokens", self.max_new_tokens, 1, MAX_TOKENS),
            *(("beams", size, 1, MAX_BEAMS) for size in self.beams),
        )
        for name, value, least, most in limits:
            if not least <= value <= most:
                raise ModelFormatError(f"captioner {name} is {value!r}; it must be from {least} to {most}")
        if self.frames % PATCH:
            raise ModelFormatError(f"captioner frames is {self.frames}; it must be a multiple of {PATCH}")
        if not self.beams or len(set(self.beams)) != len(self.beams):
            raise ModelFormatError(
                f"captioner beams is {list(self.beams)}; give different sizes, at least one"
            )
        if not self.mel_deviation > 0:
            raise ModelFormatError(f"captioner mel_deviation is {self.mel_deviation}; it must be above 0")
        if not self.prompt:
            raise ModelFormatError("captioner prompt is empty; give the one of training")

    @property
    def max_seconds(self) -> float:
        """Return the length of sound that the model reads: the rest of a longer clip is cut."""
        return self.frames * FRAME_SHIFT / SAMPLING_RATE


def write_captioner_config(config: CaptionerConfig, folder: Path) -> None:
    """Write `config.json` into `folder`."""
    text = json.dumps({"_class_name": CLASS_NAME, **asdict(config)}, indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def read_captioner_config(folder: Path) -> CaptionerConfig:
    """Return the settings in `folder`.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFormatError: it is not that of a captioner.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the path of a captioner's folder")
    data = read_json(folder / CONFIG_NAME)
    found = data.pop("_class_name", None) or data.get("model_type")
    if found != CLASS_NAME:
        raise ModelFormatError(
            f"{folder} holds {f'a {found}' if found else 'another model'}, not a captioner; give a folder "
            "that `milonga convert-captioner` or `milonga train captioning` wrote"
        )
    if "beams" in data:
        data["beams"] = tuple(data["beams"]) if isinstance(data["beams"], list) else data["beams"]
    return build_dataclass(CaptionerConfig, data, folder / CONFIG_NAME)
