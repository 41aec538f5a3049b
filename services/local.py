"""`ClipMaker` and `Scorers` in this process, with the services' defaults, limits and encodings.

Needs torch. Shapes: B pairs, S scorers.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
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
from services.api.scoring import REWARD, Reward, Rewards, Scorer, Scores, Sound
from services.audio.clips import read_pairs
from services.audio.decoding import AudioBounds, ReadClip
from services.client.sounds import RequestWriter
from services.engine import Engine, EngineConfig
from services.models.architectures import load_generator
from services.models.clap.model import ClapModel, EmbeddingModel
from services.models.reward.model import RewardModel, load_reward
from services.models.watermark import marker
from services.models.words import warnings_of
from services.runtime.settings import BatchedSettings
from services.weights.adapter_sources import AdapterSources
from services.weights.adapters import AdapterStore
from services.weights.loading import load_clap_model, load_embedding_model
from services.weights.uri import ResolvedModel

_MAX_BATCH_SECONDS: float = BatchedSettings.model_fields["max_batch_seconds"].default
"""Maximum seconds of audio in one batch of a scorer, as in the services; bounds its memory."""

Model = TypeVar("Model")


class LocalClipMaker:
    """A `StreamingClipMaker` with an engine in this process. Clips equal those of a service."""

    def __init__(self, engine: Engine) -> None:
        """Own `engine`: `close` closes it."""
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
                    yield event.as_requested(request)
                case _:
                    yield event


def open_clip_maker(
    model: ResolvedModel,
    *,
    device: str = "auto",
    dtype: str = "float32",
    config: EngineConfig | None = None,
    watermark: Path | None = None,
) -> LocalClipMaker:
    """Load a generator; takes seconds. Requests may name any adapter by its model URI.

    With `config.exact`, every denoiser call has the same shape, so that a clip is bitwise independent of
    other clips. `watermark` is AudioSeal's ``generator_base.pth``, which marks every clip.

    Raises:
        ModelError: the model, or the watermark's, was refused.
        InvalidInputError: the device does not exist.
    """
    pipeline = load_generator(model.folder, device=device, dtype=dtype)
    adapters = AdapterStore(pipeline, AdapterSources(listed={}, any_uri=True), model.digest)
    rate = pipeline.description.geometry.sampling_rate
    mark = marker(watermark, model.digest, rate, str(pipeline.device))
    return LocalClipMaker(Engine(pipeline, config, model.identity, mark, adapters))


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[Model]):
    """A scorer or reward model, and the identity of its weights."""

    model: Model
    version: ModelVersion


class LocalScorers:
    """`Scorers` with models in this process. Thread-safe: calls run one at a time."""

    def __init__(
        self, scorers: Mapping[str, Loaded[EmbeddingModel]], reward: Loaded[RewardModel] | None
    ) -> None:
        self._scorers, self._reward = scorers, reward
        self._lock = threading.Lock()

    def versions(self) -> dict[str, ModelVersion]:
        """See `Scorers`."""
        found = {name: scorer.version for name, scorer in self._scorers.items()}
        return found if self._reward is None else {**found, REWARD: self._reward.version}

    def score_audio(
        self, pairs: Sequence[tuple[str, Sound]], *, scorers: Sequence[str] | None = None
    ) -> Scores:
        """See `Scorers`."""
        chosen = {name: self._scorers[name] for name in scorers or self._scorers}
        prompts, clips = _read(pairs)
        with self._lock:
            columns = [_cosines(scorer.model, prompts, clips) for scorer in chosen.values()]
        readable_BS = np.array([[one.model.reads(prompt) for one in chosen.values()] for prompt in prompts])
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
            values=np.stack(columns, axis=1).clip(-1.0, 1.0) * readable_BS,
            readable=readable_BS,
            warnings=_warnings({name: one.model for name, one in chosen.items()}, prompts, clips),
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
            for part in passes(sizes):
                logits += model.reward(prompts[part], prepared[part]).tolist()
        warnings = _warnings({REWARD: model}, prompts, clips)
        readable = [model.reads(prompt) for prompt in prompts]
        return Rewards(rewards=tuple(map(Reward.of, logits, warnings, readable)), model=self._reward.version)

    def close(self) -> None:
        """See `Scorers`."""


def _read(pairs: Sequence[tuple[str, Sound]]) -> tuple[list[str], list[ReadClip]]:
    """Return prompts and decoded clips, checked as in a service; there may be more of them."""
    write = RequestWriter()
    messages = write.checked(BatchScoreAudioRequest(pairs=write.pairs(pairs, "pairs"))).pairs
    read = read_pairs(messages, "pairs", AudioBounds(max_batch_size=max(1, len(pairs))))
    return [prompt for prompt, _ in read], [clip for _, clip in read]


def _warnings(
    models: Mapping[str, EmbeddingModel | RewardModel], prompts: Sequence[str], clips: Sequence[ReadClip]
) -> tuple[tuple[str, ...], ...]:
    """Return each pair's warnings, on its clip and on its prompt."""
    of_prompts = warnings_of({name: model.prompt_warnings for name, model in models.items()}, prompts)
    return tuple((*clip.warnings, *found) for clip, found in zip(clips, of_prompts, strict=True))


def _cosines(model: EmbeddingModel, prompts: Sequence[str], clips: Sequence[ReadClip]) -> NDArray[np.float32]:
    """Return the CLAP scores [B]."""
    prepared = [model.prepare(clip.waveform, clip.sampling_rate) for clip in clips]
    parts = passes([windows_WS.numel() / model.sampling_rate for windows_WS in prepared])
    audio_BD = np.concatenate([model.embed_windows(prepared[part]).numpy() for part in parts])
    cosines_B: NDArray[np.float32] = (model.embed_text(prompts).numpy() * audio_BD).sum(-1)
    return cosines_B


def passes(sizes: Sequence[float], most: float = _MAX_BATCH_SECONDS) -> Iterator[slice]:
    """Yield slices of clips, whose windows last `sizes` seconds, with at most `most` each."""
    start, total = 0, 0.0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            yield slice(start, index)
            start, total = index, 0.0
        total += size
    yield slice(start, len(sizes))


def open_scorers(
    scorers: Mapping[str, ResolvedModel],
    *,
    reward: ResolvedModel | None = None,
    clap: ResolvedModel | None = None,
    device: str = "auto",
    naming: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> LocalScorers:
    """Load CLAP scorers and a reward model; takes seconds. Equal weights are loaded once.

    Args:
        scorers: CLAP models by scorer.
        reward: the reward model; None: no rewards.
        clap: the CLAP model that the reward model was trained on.
        device: torch's name of a device, or ``auto``.
        naming: returns a context to load a model in, for its role: a scorer's name, ``reward`` or ``clap``.

    Raises:
        InvalidInputError: the device does not exist, or `clap` returns no tokens.
        ModelError: a model was refused.
    """
    loaded: dict[ResolvedModel, EmbeddingModel] = {}
    named: dict[str, Loaded[EmbeddingModel]] = {}
    for name, version in scorers.items():
        if version not in loaded:
            with naming(name):
                loaded[version] = load_embedding_model(version, device)
        named[name] = Loaded(model=loaded[version], version=version.identity)
    if reward is None:
        return LocalScorers(named, None)
    assert clap is not None
    # Inference does not change CLAP, so the reward model can share it with a scorer.
    tokens = loaded.get(clap)
    if not isinstance(tokens, ClapModel):
        with naming("clap"):
            tokens = load_clap_model(clap, device)
    with naming("reward"):
        model = load_reward(reward.folder, tokens, clap.digest)
    return LocalScorers(named, Loaded(model=model, version=reward.identity))
