"""The two shapes of a request for a clip: vLLM-Omni's and ElevenLabs'. Each becomes a `Plan`.

What a shape has and Milonga can't do is refused by name, unless it asks for nothing (``speed`` 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from services.api.generation import GenerationModel, GenerationOptions
from services.audio.encoding import ENCODING_RATES
from services.errors import FieldViolation, invalid
from services.web.problems import UnknownModelError

T = TypeVar("T")

Format = Literal["wav", "flac", "mp3", "opus", "pcm", "ogg"]

_ENCODINGS: Final[Mapping[str, str]] = {"pcm": "linear16"}
"""Our encodings of formats with other names."""
CONTENT_TYPES: Final[Mapping[str, str]] = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg; codecs=opus",
    "linear16": "audio/pcm",
}
"""Content types by encoding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A request of either shape, for the generation service."""

    prompt: str
    options: GenerationOptions
    names: Mapping[str, str]
    """The shape's names of the service's fields, for its violations."""
    warnings: tuple[str, ...] = ()


def only(value: T, reason: str) -> AfterValidator:
    """Return a check that refuses every other value, since Milonga can't do what it asks for."""

    def check(given: Any) -> Any:
        if given is not None and given != value:
            raise ValueError(f"must be {value!r} or left out: {reason}")
        return given

    return AfterValidator(check)


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class AudioGenerateRequest(_Shape):
    """A clip of a prompt, in the shape of vLLM-Omni's `/v1/audio/generate`."""

    input: str
    """Description of the clip."""
    model: str | None = None
    """Name of the served model. Default: the one that is served."""
    response_format: Format = "wav"
    """Encoding. pcm: bare 16-bit little-endian samples, mono; ogg: Vorbis."""
    audio_length: float | None = None
    """Length in seconds. Default: the model's."""
    negative_prompt: str | None = None
    """Description that guidance leads away from."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance. Default: the model's."""
    guidance_stop: float | None = None
    """Share of the steps after which guidance stops, 0 to 1. Default: the model's. (Milonga's own field.)"""
    num_inference_steps: int | None = None
    """Number of denoising steps. Default: the model's."""
    seed: int | None = None
    """Seed of the noise. Default: drawn; the header X-Seed states it."""
    scheduler: str | None = None
    """Name of a scheduler. Default: the model's. (Milonga's own field.)"""
    adapter: str | None = None
    """Name of a low-rank adapter that the service has. Default: none. (Milonga's own field.)"""
    profile: str | None = None
    """Name of a profile of the model, as draft. Default: the service's. (Milonga's own field.)"""
    sample_rate: int | None = None
    """Sampling rate in hertz. Default: the model's, or 48000 if the encoding can't hold that. (Milonga's own
    field.)"""
    stream_format: Literal["audio", "sse"] = "audio"
    """sse: progress and the clip as server-sent events."""
    speed: Annotated[float | None, only(1.0, "sounds have no speed of speech")] = None
    """Must be 1."""
    audio_start: Annotated[float | None, only(0.0, "clips begin at 0 s")] = None
    """Must be 0."""

    def plan(self, served: GenerationModel) -> Plan:
        """Return the plan for the served model. Raises `InvalidInputError`."""
        check_model("model", self.model, served)
        encoding = _ENCODINGS.get(self.response_format, self.response_format)
        return Plan(
            prompt=self.input,
            options={
                "negative_prompt": self.negative_prompt,
                "duration": self.audio_length,
                "seed": self.seed,
                "num_inference_steps": self.num_inference_steps,
                "guidance_scale": self.guidance_scale,
                "guidance_stop": self.guidance_stop,
                "scheduler": self.scheduler,
                "adapter": self.adapter,
                "profile": self.profile,
                "encoding": encoding,
                "sampling_rate": self.sample_rate or _fitting_rate(encoding, served),
            },
            names={
                "prompt": "input",
                "duration": "audio_length",
                "encoding": "response_format",
                "sample_rate_hertz": "sample_rate",
            },
        )


DEFAULT_OUTPUT_FORMAT: Final = "mp3_44100_128"
DEFAULT_INFLUENCE: Final = 0.3
"""ElevenLabs' default of `prompt_influence`. It gives the model's default guidance."""

_CODECS: Final[Mapping[str, str]] = {"mp3": "mp3", "opus": "opus", "pcm": "linear16", "wav": "wav"}


class SoundGenerationRequest(_Shape):
    """A clip of a prompt, in the shape of ElevenLabs' `/v1/sound-generation`."""

    text: str
    """Description of the clip."""
    duration_seconds: float | None = None
    """Length in seconds. Default: the model's."""
    prompt_influence: Annotated[float, Field(ge=0, le=1)] | None = None
    """How closely to follow the text: 0 no guidance, 0.3 the model's default guidance scale, linear."""
    loop: Annotated[bool | None, only(False, "clips are not made to loop")] = None
    """Must be false."""
    model_id: str | None = None
    """Name of the served model; ElevenLabs' own names, which begin with eleven_, are taken for it."""
    output_format: str | None = None
    """CODEC_RATE or CODEC_RATE_BITRATE, with the codecs mp3, opus, pcm and wav. Also as a query parameter.
    Default: mp3_44100_128."""

    def plan(self, served: GenerationModel) -> Plan:
        """Return the plan for the served model. Raises `InvalidInputError`."""
        if self.model_id is not None and not self.model_id.startswith("eleven_"):
            check_model("model_id", self.model_id, served)
        encoding, rate, bitrate = _read_output_format(self.output_format or DEFAULT_OUTPUT_FORMAT)
        guidance = None
        if self.prompt_influence is not None:
            span = max(0.0, served.defaults.guidance_scale - 1) / DEFAULT_INFLUENCE
            guidance = min(1 + self.prompt_influence * span, served.limits.max_guidance_scale)
        return Plan(
            prompt=self.text,
            options={
                "duration": self.duration_seconds,
                "guidance_scale": guidance,
                "encoding": encoding,
                "sampling_rate": rate,
            },
            names={
                "prompt": "text",
                "duration": "duration_seconds",
                "guidance_scale": "prompt_influence",
                "encoding": "output_format",
                "sample_rate_hertz": "output_format",
            },
            warnings=(f"output_format: the bit rate is the encoder's choice, not {bitrate} kbit/s",)
            if bitrate
            else (),
        )


def check_model(field: str, name: str | None, served: GenerationModel) -> None:
    """Raise `UnknownModelError` if a request asks for a model that is not served."""
    known = (served.model.name, f"{served.model.name}@{served.model.version}")
    if name is not None and name not in known:
        fault = f"is {name[:80]!r}, which is not served, must be {' or '.join(known)}, or left out"
        raise UnknownModelError(FieldViolation(field, fault))


def _fitting_rate(encoding: str, served: GenerationModel) -> int | None:
    """Return the rate for an encoding that can't hold the model's; None for the model's own."""
    own, rates = served.geometry.sampling_rate, ENCODING_RATES.get(encoding)
    return None if rates is None or own in rates else max(rates)


def _read_output_format(text: str) -> tuple[str, int, int | None]:
    """Return encoding, sampling rate and bit rate. Raises `InvalidInputError`."""
    codec, *numbers = text.split("_")
    form = "CODEC_RATE or CODEC_RATE_BITRATE, as mp3_44100_128, opus_48000_96, pcm_16000 or wav_44100"
    if not 1 <= len(numbers) <= 2 or not all(one.isascii() and one.isdecimal() for one in numbers):
        raise invalid("output_format", f"is {text[:40]!r}, must be {form}")
    if codec not in _CODECS:
        raise invalid("output_format", f"is {text[:40]!r}, whose codec is not made, must be {form}")
    rate, *bitrate = (int(one[:9]) for one in numbers)
    return _CODECS[codec], rate, bitrate[0] if bitrate else None
