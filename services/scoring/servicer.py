"""The rpcs of ScoringService: decode, let the scorers embed, encode.

Shapes: B clips or prompts, D embedding width, P members of the panel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from milonga.v1 import audio_pb2
from milonga.v1 import scoring_pb2 as pb
from milonga.v1 import scoring_pb2_grpc as rpc
from services.audio.clips import AudioBounds, read_clips, read_pairs, read_prompts
from services.errors import FieldViolation, InvalidInputError
from services.runtime.offloading import OffLoop
from services.scoring.scorers import Panel, Scorer, together
from services.scoring.settings import ScoringSettings
from services.wire import write_version

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["ScoringService"].full_name

Prepared = dict[Scorer, list[Tensor]]
"""Clips as each scorer takes them."""

Read = TypeVar("Read")

Context = object
"""Nothing of the call is read but its message."""


class ScoringServicer(rpc.ScoringServiceServicer):
    """Serves named scorers. Exceptions are mapped by the interceptor."""

    def __init__(self, scorers: Mapping[str, Scorer], settings: ScoringSettings) -> None:
        self.scorers, self.bounds = scorers, AudioBounds(max_batch_size=settings.max_batch_size)
        self._off_loop = OffLoop()
        self._listing = pb.ListScorersResponse(
            scorers=write_scorers(scorers), limits=self.bounds.message(settings.max_request_bytes)
        )

    async def BatchScoreAudio(
        self, request: pb.BatchScoreAudioRequest, context: Context
    ) -> pb.BatchScoreAudioResponse:
        """See scoring.proto."""
        panel, faults = choose(request.scorers, self.scorers)
        panel.check()
        prompts, clips = await self._off_loop(
            lambda: prepare_pairs(request.pairs, panel, self.bounds, faults)
        )
        texts, sounds = await together(panel.embed_text(prompts), panel.embed_audio(clips))
        return write_scores(panel, texts, sounds)

    async def BatchEmbedAudio(
        self, request: pb.BatchEmbedAudioRequest, context: Context
    ) -> pb.BatchEmbedAudioResponse:
        """See scoring.proto."""
        panel, faults = choose(request.scorers, self.scorers)
        panel.check()
        clips = await self._off_loop(lambda: prepare_clips(request.clips, panel, self.bounds, faults))
        sounds = await panel.embed_audio(clips)
        return pb.BatchEmbedAudioResponse(
            scorers=write_scorers(panel.members), results=write_embeddings(sounds)
        )

    async def BatchEmbedText(
        self, request: pb.BatchEmbedTextRequest, context: Context
    ) -> pb.BatchEmbedTextResponse:
        """See scoring.proto."""
        panel, faults = choose(request.scorers, self.scorers)
        texts = await panel.embed_text(check_prompts(request.prompts, self.bounds, faults))
        return pb.BatchEmbedTextResponse(
            scorers=write_scorers(panel.members), results=write_embeddings(texts)
        )

    async def ListScorers(self, request: pb.ListScorersRequest, context: Context) -> pb.ListScorersResponse:
        """See scoring.proto."""
        return self._listing


def choose(names: Sequence[str], scorers: Mapping[str, Scorer]) -> tuple[Panel, tuple[FieldViolation, ...]]:
    """Return the scorers that a request names (all where it names none), and what is wrong with the names."""
    if not names:
        return Panel(scorers), ()
    if len(names) > len(scorers):
        fault = f"has {len(names)} elements, and there are {len(scorers)} scorers; name each once"
        return Panel(scorers), (FieldViolation("scorers", fault),)
    chosen: dict[str, Scorer] = {}
    faults = []
    for index, name in enumerate(names):
        if name not in scorers:
            known = f"must be one of {', '.join(scorers)}"
            faults.append(FieldViolation(f"scorers[{index}]", f"is {name[:80]!r}, {known}"))
        elif name in chosen:
            first = list(names).index(name)
            faults.append(
                FieldViolation(f"scorers[{index}]", f"is {name!r}, as scorers[{first}] is; name each once")
            )
        else:
            chosen[name] = scorers[name]
    return Panel(chosen), tuple(faults)


def prepare_pairs(
    pairs: Sequence[audio_pb2.PromptedClip],
    panel: Panel,
    bounds: AudioBounds,
    faults: Sequence[FieldViolation] = (),
) -> tuple[list[str], Prepared]:
    """Return the prompts, and the clips as each scorer takes them.

    Raises:
        InvalidInputError: with every violated field, and `faults` found before.
    """
    read = _read(lambda: read_pairs(pairs, "pairs", bounds), faults)
    return [prompt for prompt, _ in read], panel.prepare([clip for _, clip in read])


def prepare_clips(
    clips: Sequence[audio_pb2.Clip],
    panel: Panel,
    bounds: AudioBounds,
    faults: Sequence[FieldViolation] = (),
) -> Prepared:
    """As `prepare_pairs`, without prompts."""
    return panel.prepare(_read(lambda: read_clips(clips, "clips", bounds), faults))


def check_prompts(
    prompts: Sequence[str], bounds: AudioBounds, faults: Sequence[FieldViolation] = ()
) -> list[str]:
    """As `prepare_pairs`, without clips."""
    return _read(lambda: read_prompts(prompts, "prompts", bounds), faults)


def write_scores(
    panel: Panel, texts: Sequence[NDArray[np.float32]], sounds: Sequence[NDArray[np.float32]]
) -> pb.BatchScoreAudioResponse:
    """Return the cosines of embeddings [B, D] of prompts and of their clips, by each member."""
    cosines = [(text * sound).sum(-1) for text, sound in zip(texts, sounds, strict=True)]
    scores_BP = np.stack(cosines, axis=1).clip(-1.0, 1.0)
    return pb.BatchScoreAudioResponse(
        scorers=write_scorers(panel.members), results=[pb.AudioScores(scores=row) for row in scores_BP]
    )


def write_embeddings(embeddings: Sequence[NDArray[np.float32]]) -> Iterable[pb.Embeddings]:
    """Return embeddings [B, D] by each member, clip by clip."""
    for rows in zip(*embeddings, strict=True):
        yield pb.Embeddings(embeddings=[pb.Embedding(values=row) for row in rows])


def write_scorers(scorers: Mapping[str, Scorer]) -> list[pb.Scorer]:
    """Return the scorers and which weights they are."""
    return [
        pb.Scorer(
            name=name,
            model=write_version(scorer.version),
            dimension=scorer.dimension,
            sample_rate_hertz=scorer.sampling_rate,
        )
        for name, scorer in scorers.items()
    ]


def _read(read: Callable[[], Read], faults: Sequence[FieldViolation]) -> Read:
    try:
        made = read()
    except InvalidInputError as error:
        raise InvalidInputError(*error.violations, *faults) from error
    if faults:
        raise InvalidInputError(*faults)
    return made
