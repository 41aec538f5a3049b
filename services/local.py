"""Clips and judgements from models in this process, with the services' defaults, limits and encodings.

Needs torch. Shapes: B pairs, S scorers.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from milonga.v1 import audio_pb2
from milonga.v1 import generation_pb2 as pb
from services import client
from services.audio.clips import AudioBounds, ReadClip, read_pairs
from services.engine import ClipReady, Engine, EngineConfig, Event, Failed, Finished, GenerationRequest
from services.errors import FieldViolation, InvalidInputError, ModelError
from services.generation import convert
from services.models.clap.model import ClapModel
from services.models.reward.model import RewardModel, load_reward
from services.models.tango.loading import load_tango
from services.reward.convert import sigmoid
from services.scoring.scorers import EmbeddingModel, load_scorer
from services.weights.uri import ModelURI, ResolvedModel, resolve

_MAX_BATCH_SECONDS = 80.0
"""Sound in one pass of a judge: what bounds its memory. The services' default."""

Model = TypeVar("Model")


class LocalSource:
    """Answers as `AudioClient` does, from an engine of its own: the same request gives the same clip."""

    def __init__(self, engine: Engine, model: ResolvedModel) -> None:
        """Take over `engine`, which serves `model`: closing the source closes it."""
        self._engine = engine
        self._version, self._model = model, model.message()
        self._reading = convert.reading_of(engine)

    def stream(self, prompt: str, **options: Unpack[client.GenerationOptions]) -> Iterator[client.Update]:
        """As `AudioClient.stream`. Leaving the loop cancels the rest."""
        request, output = convert.read_request(client.build_request(prompt, **options), **self._reading)
        return self._updates(request, output)

    def _updates(self, request: GenerationRequest, output: convert.OutputFormat) -> Iterator[client.Update]:
        start = time.monotonic()
        for event in self._engine.stream(request):
            yield client.read_update(self._message(event, output, start))

    def _message(
        self, event: Event, output: convert.OutputFormat, start: float
    ) -> pb.StreamGenerateAudioResponse:
        """The message that the service would send; it is read as if it had come over the wire."""
        match event:
            case Failed(error=error):
                raise error
            case ClipReady():
                return pb.StreamGenerateAudioResponse(clip=convert.write_clip(event, output))
            case Finished():
                timings = convert.write_timings(event.timings, time.monotonic() - start)
                return pb.StreamGenerateAudioResponse(
                    finished=pb.FinishedEvent(model=self._model, warnings=event.warnings, timings=timings)
                )
            case _:
                return convert.write_event(event)

    def get_model(self) -> pb.GetModelResponse:
        """As `AudioClient.get_model`."""
        reading = self._reading
        geometry = self._engine.pipeline.geometry
        return convert.write_model(self._version, geometry, reading["limits"], reading["defaults"])

    def close(self) -> None:
        """Stop the engine; what runs is given up."""
        self._engine.close(0.0)


def open_local(
    uri: str, *, device: str = "auto", dtype: str = "float32", batch: int | None = None
) -> LocalSource:
    """Resolve, verify and load the model that `uri` names, which takes seconds.

    With `batch`, every denoiser call has that one shape: clips do not depend, not in a bit, on which others
    are made beside them. Without it a call has the smallest shape that fits.

    Raises:
        ModelError: the model was refused.
    """
    model = resolve(uri)
    config = EngineConfig() if batch is None else EngineConfig(batch_shapes=(batch,), exact=True)
    return LocalSource(Engine(load_tango(model.folder, device=device, dtype=dtype), config), model)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[Model]):
    """A judge, and which weights it is."""

    model: Model
    version: ResolvedModel

    def client_version(self) -> client.ModelVersion:
        """The identity of the weights, as the client tells it."""
        version = self.version
        return client.ModelVersion(
            name=version.name, version=version.version, digest=version.digest, license=version.license
        )


class LocalJudges:
    """Answers as `AudioClient` does, from models of its own. Thread-safe: callers take turns."""

    def __init__(
        self, scorers: Mapping[str, Loaded[EmbeddingModel]], reward: Loaded[RewardModel] | None
    ) -> None:
        self._scorers, self._reward = scorers, reward
        self._lock = threading.Lock()

    def score_audio(
        self, pairs: Sequence[tuple[str, bytes]], *, scorers: Sequence[str] | None = None
    ) -> client.Scores:
        """As `AudioClient.score_audio`, of files."""
        chosen = {name: self._scorers[name] for name in scorers or self._scorers}
        prompts, clips = _read(pairs)
        with self._lock:
            columns = [_cosines(scorer.model, prompts, clips) for scorer in chosen.values()]
        return client.Scores(
            scorers=tuple(
                client.Scorer(
                    name=name,
                    model=scorer.client_version(),
                    dimension=scorer.model.dimension,
                    sampling_rate=scorer.model.sampling_rate,
                )
                for name, scorer in chosen.items()
            ),
            values=np.stack(columns, axis=1).clip(-1.0, 1.0),
        )

    def compute_rewards(self, pairs: Sequence[tuple[str, bytes]]) -> client.Rewards:
        """As `AudioClient.compute_rewards`, of files."""
        assert self._reward is not None
        model = self._reward.model
        prompts, clips = _read(pairs)
        heard = [model.prepare(clip.waveform, clip.sampling_rate) for clip in clips]
        sizes = [clip.windows_WS.numel() / model.clap.sampling_rate for clip in heard]
        logits: list[float] = []
        with self._lock:
            for part in _passes(sizes):
                logits += model.reward(prompts[part], heard[part]).tolist()
        return client.Rewards(
            rewards=tuple(client.Reward(logit=logit, probability=sigmoid(logit)) for logit in logits),
            model=self._reward.client_version(),
        )


def _read(pairs: Sequence[tuple[str, bytes]]) -> tuple[list[str], list[ReadClip]]:
    """Decode, and refuse, as a service does."""
    messages = [
        audio_pb2.PromptedClip(prompt=prompt, clip=audio_pb2.Clip(audio=content)) for prompt, content in pairs
    ]
    read = read_pairs(messages, "pairs", AudioBounds())
    return [prompt for prompt, _ in read], [clip for _, clip in read]


def _cosines(model: EmbeddingModel, prompts: Sequence[str], clips: Sequence[ReadClip]) -> NDArray[np.float32]:
    """CLAP scores [B]."""
    heard = [model.prepare(clip.waveform, clip.sampling_rate) for clip in clips]
    parts = _passes([windows_WS.numel() / model.sampling_rate for windows_WS in heard])
    audio_BD = np.concatenate([model.embed_windows(heard[part]).numpy() for part in parts])
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


def open_judges(
    scorers: Mapping[str, str], *, reward: str | None, clap: str, device: str = "auto"
) -> LocalJudges:
    """Resolve, verify and load judges, which takes seconds. Equal weights are loaded once.

    Args:
        scorers: model URI by name.
        reward: model URI of a reward model.
        clap: model URI of the CLAP model that it stands on.
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
        with _told_of(flag):
            version = resolve(uri)
            key = (uri.scheme == "laion-clap", version.digest)
            if key not in loaded:
                loaded[key] = load_scorer(uri, version, device)
            return Loaded(model=loaded[key], version=version)

    panel = {name: load(f"--scorer {name}") for name in scorers}
    if reward is None:
        return LocalJudges(panel, None)
    with _told_of("--reward"):
        version = resolve(parsed["--reward"])
    stand = load("--clap")
    assert isinstance(stand.model, ClapModel)
    with _told_of("--reward"):
        # It takes nothing from CLAP that a scorer would miss: they share one.
        model = load_reward(version.folder, stand.model, stand.version.digest)
    return LocalJudges(panel, Loaded(model=model, version=version))


def _parse(flags: Mapping[str, str]) -> dict[str, ModelURI]:
    """Take model URIs apart, by flag; all that are none are told at once."""
    parsed: dict[str, ModelURI] = {}
    faults: list[FieldViolation] = []
    for flag, text in flags.items():
        try:
            with _told_of(flag):
                parsed[flag] = ModelURI.parse(text)
        except InvalidInputError as error:
            faults += error.violations
    if faults:
        raise InvalidInputError(*faults)
    return parsed


@contextlib.contextmanager
def _told_of(flag: str) -> Iterator[None]:
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
