"""The generator of the candidates: an engine in this process, or a generation service."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from services.api.generation import ClipMaker, GenerationOptions
from services.api.model import ModelVersion
from services.audio.encoding import MAX_SAMPLING_RATE, MIN_SAMPLING_RATE
from services.client import ServiceOptions, address_fault
from services.models.folders import DTYPES
from services.weights.uri import resolve
from training.loop.checks import Parallel, Range, check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(ServiceOptions):
    """A generator of clips, and the load on it. The settings of a connection are those of `server`."""

    model: str = "mini"
    """URI of the model, for an engine in this process."""
    server: str | None = None
    """Address of a generation service to use instead."""
    device: str = "auto"
    """Device of the engine."""
    dtype: str = "float32"
    """Number format of the engine's text encoder and denoiser."""
    batch: Parallel = 8
    """Clips in each of the engine's denoiser calls: one shape, so that no clip depends on its neighbours."""
    threads: Parallel | None = None
    """CPU threads of the engine; none: torch's choice."""
    in_flight: Parallel = 16
    """Concurrent requests."""
    sampling_rate: Annotated[int, Range(MIN_SAMPLING_RATE, MAX_SAMPLING_RATE)] = 16_000
    """Sampling rate of the clips in hertz."""
    encoding: Literal["flac", "wav"] = "flac"
    """Encoding of the clips. Both keep all bits of 16-bit samples."""

    def __post_init__(self) -> None:
        ServiceOptions.__post_init__(self)
        check_ranges(self)
        check_addresses(self, "server")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One clip to generate."""

    number: int
    """Index among all candidates, by which shards divide them."""
    strategy: str
    caption: str
    """Caption to score the clip against."""
    prompt: str
    """Prompt that generates it."""
    kind: str | None
    """Kind of perturbation of the prompt; None if it is the caption."""
    slot: int
    """Index among the caption's clips in the strategy."""
    seed: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    duration: float | None

    def settings(self) -> dict[str, Any]:
        """Return all that determines the clip's content but the model."""
        settings = asdict(self)
        for name in ("number", "kind"):
            del settings[name]
        return settings

    def options(self, source: SourceConfig) -> GenerationOptions:
        """Return the options of the request."""
        return {
            "duration": self.duration,
            "clip_count": 1,
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
            "encoding": source.encoding,
            "sampling_rate": source.sampling_rate,
        }


def model_of(config: SourceConfig) -> ModelVersion:
    """Return the version of the weights that make the clips, without loading them."""
    if config.server is None:
        return resolve(config.model).identity
    with config.open(config.server) as client:
        return client.get_model().model


def open_source(config: SourceConfig) -> ClipMaker:
    """Load the engine's model, or connect to the service."""
    if config.server is not None:
        return config.open(config.server, retries=4)
    from services.engine import EngineConfig
    from services.local import open_clip_maker

    engine = EngineConfig(
        batch_shapes=(config.batch,),
        exact=True,
        max_queue=max(64, config.in_flight),
        threads=config.threads,
    )
    return open_clip_maker(resolve(config.model), device=config.device, dtype=config.dtype, config=engine)


def check_addresses(config: object, *names: str) -> None:
    """Raise ValueError if a field of `config` is neither None nor the address of a service."""
    for name in names:
        address = getattr(config, name)
        if address is not None and (fault := address_fault(address)):
            raise ValueError(f"{name} {fault}")
