"""`ClipMaker` and `Scorers` in this process, with the services' defaults, limits and encodings.

Needs torch. Shapes: B pairs, S scorers.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from milonga.v1.scoring_pb2 import BatchScoreAudioRequest
from services.api.generation import (
    Clip,
    Failed,
    Generation,
    GenerationModel,
    GenerationOptions,
    GenerationRequest,
    Update,
    collect,
)
from services.api.model import ModelVersion
from services.api.scoring import Reward, Rewards, Scorer, Scores, Sound
from services.audio.clips import AudioBounds, ReadClip, read_pairs
from services.client.sounds import RequestWriter
from services.engine import Engine, EngineConfig
from services.errors import FieldViolation, InvalidInputError, ModelError
from services.models.clap.model import ClapModel
from services.models.reward.model import RewardModel, load_reward
from services.models.tango.loading import load_tango
from services.reward.convert import sigmoid
from services.scoring.scorers import EmbeddingModel, load_scorer
from services.weights.uri import ModelURI, ResolvedModel, resolve

_MAX_BATCH_SECONDS = 80.0
"""Sound in one pass of a scorer: what bounds its memory. The services' default."""

Model = TypeVar("Model")


class LocalClipMaker:
    """A `ClipMaker` on an engine of its own: the same request gives the same clip as from a service."""

    def __init__(self, engine: Engine) -> None:
        """Take over `engine`: closing the clip maker closes it."""
        self._engine = engine

    def get_model(self) -> GenerationModel:
        """See `ClipMaker`."""
        return self._engine.description

    def stream(self, prompt: str, **options: Unpack[GenerationOptions]) -> Iterator[Update]:
        """See `ClipMaker`."""
        return self._updates(self._engine.request(prompt, **options))

    def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> Generation:
        """See `ClipMaker`."""
        return collect(self.stream(prompt, **options))

    def close(self) -> None:
        """See `ClipMaker`."""
        self._engine.close(0.0)

    def _updates(self, request: GenerationRequest) -> Iterator[Update]:
        for event in self._engine.stream(request):
            match event:
                case Failed(error=error):
                    raise error
                case Clip():
                    yield event.encoded(request.encoding, request.sampling_rate)
                case _:
                    yield event


def open_clip_maker(
    model: ResolvedModel, *, device: str = "auto", dtype: str = "float32", config: EngineConfig | None = None
) -> LocalClipMaker:
    """Load a generator, which takes seconds.

    With `config.exact`, every denoiser call has one shape: no bit of a clip depends on which others are made
    beside it.

    Raises:
        ModelError: the model was refused.
        InvalidInputError: the device does not exist.
    """
    pipeline = load_tango(model.folder, device=device, dtype=dtype)
    return LocalClipMaker(Engine(pipeline, config, model.identity))


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[Model]):
    """A scorer or reward model, and which weights it is."""

    model: Model
    version: ModelVersion


class LocalScorers:
    """`Scorers` on models of its own. Thread-safe: callers take turns."""

    def __init__(
        self, scorers: Mapping[str, Loaded[EmbeddingModel]], reward: Loaded[RewardModel] | None
    ) -> None:
        self._scorers, self._reward = scorers, reward
        self._lock = threading.Lock()

    def score_audio(
        self, pairs: Sequence[tuple[str, Sound]], *, scorers: Sequence[str] | None = None
    ) -> Scores:
        """See `Scorers`."""
        chosen = {name: self._scorers[name] for name in scorers or self._scorers}
        prompts, clips = _read(pairs)
        with self._lock:
            columns = [_cosines(scorer.model, prompts, clips) for scorer in chosen.values()]
        return Scores(
            scorers=tuple(
                Scorer(
                    name=name,
                    model=scorer.version,
                    dimension=scorer.model.dimension,
                    sampling_rate=scorer.model.sampling_rate,
                )
                for name, scorer in chosen.items()
            ),
            values=np.stack(columns, axis=1).clip(-1.0, 1.0),
        )

    def compute_rewards(self, pairs: Sequence[tuple[str, Sound]]) -> Rewards:
        """See `Scorers`."""
        assert self._reward is not None
        model = self._reward.model
        prompts, clips = _read(pairs)
        prepared = [model.prepare(clip.waveform, clip.sampling_rate) for clip in clips]
        sizes = [clip.windows_WS.numel() / model.clap.sampling_rate for clip in prepared]
        logits: list[float] = []
        with self._lock:
            for part in _passes(sizes):
                logits += model.reward(prompts[part], prepared[part]).tolist()
        return Rewards(
            rewards=tuple(Reward(logit=logit, probability=sigmoid(logit)) for logit in logits),
            model=self._reward.version,
        )

    def close(self) -> None:
        """See `Scorers`."""


def _read(pairs: Sequence[tuple[str, Sound]]) -> tuple[list[str], list[ReadClip]]:
    """Decode, and refuse, as a service does."""
    write = RequestWriter()
    messages = write.checked(BatchScoreAudioRequest(pairs=write.pairs(pairs, "pairs"))).pairs
    read = read_pairs(messages, "pairs", AudioBounds())
    return [prompt for prompt, _ in read], [clip for _, clip in read]


def _cosines(model: EmbeddingModel, prompts: Sequence[str], clips: Sequence[ReadClip]) -> NDArray[np.float32]:
    """CLAP scores [B]."""
    prepared = [model.prepare(clip.waveform, clip.sampling_rate) for clip in clips]
    parts = _passes([windows_WS.numel() / model.sampling_rate for windows_WS in prepared])
    audio_BD = np.concatenate([model.embed_windows(prepared[part]).numpy() for part in parts])
    cosines_B: NDArray[np.float32] = (model.embed_text(prompts).numpy() * audio_BD).sum(-1)
    return cosines_B


def _passes(sizes: Sequence[float]) -> Iterator[slice]:
    """Cut clips, whose windows last `sizes` seconds, into passes of `_MAX_BATCH_SECONDS`; one at least."""
    start, total = 0, 0.0
    for index, size in enumerate(sizes):
        if index > start and total + size > _MAX_BATCH_SECONDS:
            yield slice(start, index)
            start, total = index, 0.0
        total += size
    yield slice(start, len(sizes))


def open_scorers(
    scorers: Mapping[str, str], *, reward: str | None, clap: str, device: str = "auto"
) -> LocalScorers:
    """Resolve, verify and load scorers and a reward model: seconds. Equal weights are loaded once.

    Args:
        scorers: model URI by name.
        reward: model URI of a reward model.
        clap: model URI of the CLAP model that it was trained on.
        device: torch's name, or ``auto``.

    Raises:
        InvalidInputError: a URI is none, or the device does not exist, in the words of the flag.
        ModelError: a model was refused.
    """
    named = {f"--scorer {name}": uri for name, uri in scorers.items()}
    parsed = _parse(named if reward is None else {**named, "--reward": reward, "--clap": clap})
    if reward is not None and parsed["--clap"].scheme == "laion-clap":
        # laion_clap's own class gives embeddings alone, and a reward model reads tokens.
        raise InvalidInputError(
            FieldViolation("--clap", f"is {clap[:80]!r}, which shows no tokens; give laion:PATH")
        )
    loaded: dict[tuple[bool, str], EmbeddingModel] = {}

    def load(flag: str) -> Loaded[EmbeddingModel]:
        uri = parsed[flag]
        with _named_errors(flag):
            version = resolve(uri)
            key = (uri.scheme == "laion-clap", version.digest)
            if key not in loaded:
                loaded[key] = load_scorer(uri, version, device)
            return Loaded(model=loaded[key], version=version.identity)

    panel = {name: load(f"--scorer {name}") for name in scorers}
    if reward is None:
        return LocalScorers(panel, None)
    with _named_errors("--reward"):
        version = resolve(parsed["--reward"])
    stand = load("--clap")
    assert isinstance(stand.model, ClapModel)
    with _named_errors("--reward"):
        # It takes nothing from CLAP that a scorer would miss: they share one.
        model = load_reward(version.folder, stand.model, stand.version.digest)
    return LocalScorers(panel, Loaded(model=model, version=version.identity))


def _parse(flags: Mapping[str, str]) -> dict[str, ModelURI]:
    """Parse model URIs, by flag; all wrong ones are reported at once."""
    parsed: dict[str, ModelURI] = {}
    faults: list[FieldViolation] = []
    for flag, text in flags.items():
        try:
            with _named_errors(flag):
                parsed[flag] = ModelURI.parse(text)
        except InvalidInputError as error:
            faults += error.violations
    if faults:
        raise InvalidInputError(*faults)
    return parsed


@contextlib.contextmanager
def _named_errors(flag: str) -> Iterator[None]:
    """Name the flag in errors of the model that it names."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(
            *(
                FieldViolation("--device" if fault.field == "device" else flag, fault.description)
                for fault in error.violations
            )
        ) from error
    except ModelError as error:
        raise type(error)(f"{flag}: {error}") from error
