"""Who makes clips: an engine in this process, or a generation service. Shapes: N samples."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from services.client import AudioClient, ModelVersion
from services.errors import MilongaError
from services.models.folders import DTYPES
from services.weights.uri import ModelURI, ResolvedModel, resolve

if TYPE_CHECKING:
    from services.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """A generator of clips, and how many requests it is given at a time."""

    model: str = "mini"
    """URI of the model of an engine in this process."""
    server: str | None = None
    """Address of a generation service that is asked instead."""
    device: str = "auto"
    """Of the engine."""
    dtype: str = "float32"
    """Of the engine's text encoder and denoiser."""
    batch: int = 8
    """Clips in each of the engine's denoiser calls: one shape, so that no clip depends on its neighbours."""
    threads: int | None = None
    """CPU threads of the engine; none: torch's choice."""
    in_flight: int = 16
    """Requests at a time."""
    sampling_rate: int = 16_000
    """Hertz of the clips."""
    encoding: Literal["flac", "wav"] = "flac"
    """Of the clips; both keep every bit of 16."""
    timeout: float = 600.0
    """Seconds that a service may take for one clip."""

    def __post_init__(self) -> None:
        for name in ("batch", "in_flight", "sampling_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout is {self.timeout}, must be seconds above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One clip to make."""

    number: int
    """Place among all jobs: what shards are cut by."""
    strategy: str
    caption: str
    """What the clip will be judged against."""
    prompt: str
    """What it is made of."""
    kind: str | None
    """What is wrong with the prompt; None where it is the caption."""
    slot: int
    """Place among the caption's clips in the strategy."""
    seed: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    duration: float | None

    def settings(self) -> dict[str, Any]:
        """All that the clip's content depends on, but the model."""
        settings = asdict(self)
        for name in ("number", "kind"):
            del settings[name]
        return settings


class ClipSource(Protocol):
    """Makes clips. Thread-safe: callers ask side by side."""

    model: ModelVersion
    """Which weights make them."""

    def make(self, job: Job) -> bytes:
        """The encoded clip of a job; the same job gives the same clip. Raises `MilongaError`."""

    def close(self) -> None:
        """Give up what runs, and free what is held."""


def model_of(config: SourceConfig) -> ModelVersion:
    """Which weights make the clips, without loading them."""
    if config.server is None:
        return resolve(ModelURI.parse(config.model)).identity
    with AudioClient(config.server, timeout=config.timeout) as client:
        return client.get_model().model


def open_source(config: SourceConfig) -> ClipSource:
    """Load the engine's model, or connect to the service."""
    if config.server is not None:
        return ServiceSource(config)
    from services.engine import Engine, EngineConfig
    from services.models.tango.loading import load_tango

    resolved = resolve(ModelURI.parse(config.model))
    pipeline = load_tango(resolved.folder, device=config.device, dtype=config.dtype)
    engine = Engine(
        pipeline,
        EngineConfig(
            batch_shapes=(config.batch,),
            exact=True,
            max_queue=max(64, config.in_flight),
            threads=config.threads,
        ),
    )
    return EngineSource(engine, resolved, config)


class EngineSource:
    """An engine in this process, which is closed with it."""

    def __init__(self, engine: "Engine", model: ResolvedModel, config: SourceConfig) -> None:
        self.model = model.identity
        self._engine, self._config = engine, config

    def make(self, job: Job) -> bytes:
        """See `ClipSource`."""
        request = self._engine.request(
            job.prompt,
            duration=job.duration,
            seed=job.seed,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            scheduler=job.scheduler,
        )
        clip = self._engine.generate(request).clips[0]
        return clip.encoded(self._config.encoding, self._config.sampling_rate).audio

    def close(self) -> None:
        """See `ClipSource`."""
        self._engine.close()


class ServiceSource:
    """A generation service."""

    def __init__(self, config: SourceConfig) -> None:
        self.model = model_of(config)
        self._config = config
        self._client = AudioClient(config.server, timeout=config.timeout, retries=4)

    def make(self, job: Job) -> bytes:
        """See `ClipSource`."""
        made = self._client.generate(
            job.prompt,
            duration=job.duration,
            clip_count=1,
            seed=job.seed,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            scheduler=job.scheduler,
            encoding=self._config.encoding,
            sampling_rate=self._config.sampling_rate,
        )
        if made.model.digest != self.model.digest:
            raise MilongaError(
                f"{self._config.server} changed its weights from {self.model.digest} to {made.model.digest}; "
                "pin the service to one version and run again"
            )
        return made.clips[0].audio

    def close(self) -> None:
        """See `ClipSource`."""
        self._client.close()
