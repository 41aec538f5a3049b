"""The rpcs of ScoringService: decode, embed, encode.

Shapes: B clips or prompts, D embedding width, P scorers.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from milonga.v1 import scoring_pb2 as pb
from milonga.v1 import scoring_pb2_grpc as rpc
from services.audio.clips import read_prompts, write_limits
from services.audio.decoding import AudioBounds
from services.errors import FieldViolation
from services.runtime.decoding import ClipDecoder, also
from services.scoring.scorers import Scorer, ScorerGroup, gather_or_cancel
from services.scoring.settings import ScoringSettings
from services.wire import write_version

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["ScoringService"].full_name

Warnings = Sequence[Sequence[str]]
"""Sentences on each pair, clip or prompt."""

Context = object
"""The rpcs read only their request, so any context will do."""


class ScoringServicer(rpc.ScoringServiceServicer):
    """Serves named scorers. `CallInterceptor` maps exceptions to statuses."""

    def __init__(self, scorers: Mapping[str, Scorer], settings: ScoringSettings) -> None:
        self.scorers, self.bounds = scorers, AudioBounds(max_batch_size=settings.max_batch_size)
        self._decoder = ClipDecoder(self.bounds)
        self._listing = pb.ListScorersResponse(
            scorers=write_scorers(scorers), limits=write_limits(self.bounds, settings.max_request_bytes)
        )

    async def BatchScoreAudio(
        self, request: pb.BatchScoreAudioRequest, context: Context
    ) -> pb.BatchScoreAudioResponse:
        """See scoring.proto."""
        group, faults = choose(request.scorers, self.scorers)
        with group.expect(len(request.pairs)):
            pairs = await self._decoder.pairs(request.pairs, group, faults)
            del request  # its clips are no longer needed
            prompts, clips = [prompt for prompt, _ in pairs], [clip for _, clip in pairs]
            of_prompts, readable_BP = await self._decoder.run(
                lambda: (group.prompt_warnings(prompts), group.readable(prompts))
            )
            texts, sounds = await gather_or_cancel(group.embed_text(prompts), group.embed_audio(clips))
        warnings = [(*clip.warnings, *of) for clip, of in zip(clips, of_prompts, strict=True)]
        return write_scores(group, texts, sounds, readable_BP, warnings)

    async def BatchEmbedAudio(
        self, request: pb.BatchEmbedAudioRequest, context: Context
    ) -> pb.BatchEmbedAudioResponse:
        """See scoring.proto."""
        group, faults = choose(request.scorers, self.scorers)
        with group.expect(len(request.clips)):
            clips = await self._decoder.clips(request.clips, group, faults)
            del request
            sounds = await group.embed_audio(clips)
        warnings = [clip.warnings for clip in clips]
        return pb.BatchEmbedAudioResponse(
            scorers=write_scorers(group.members), results=write_embeddings(sounds, warnings)
        )

    async def BatchEmbedText(
        self, request: pb.BatchEmbedTextRequest, context: Context
    ) -> pb.BatchEmbedTextResponse:
        """See scoring.proto."""
        group, faults = choose(request.scorers, self.scorers)
        prompts, warnings = await self._decoder.run(
            lambda: read_texts(request.prompts, group, self.bounds, faults)
        )
        texts = await group.embed_text(prompts)
        return pb.BatchEmbedTextResponse(
            scorers=write_scorers(group.members), results=write_embeddings(texts, warnings)
        )

    async def ListScorers(self, request: pb.ListScorersRequest, context: Context) -> pb.ListScorersResponse:
        """See scoring.proto."""
        return self._listing


def choose(
    names: Sequence[str], scorers: Mapping[str, Scorer]
) -> tuple[ScorerGroup, tuple[FieldViolation, ...]]:
    """Return the scorers that a request names (all if it names none), and the violations of its names."""
    if not names:
        return ScorerGroup(scorers), ()
    if len(names) > len(scorers):
        fault = (
            f"has {len(names)} elements, but there are only {len(scorers)} scorers; name each at most once"
        )
        return ScorerGroup(scorers), (FieldViolation("scorers", fault),)
    chosen: dict[str, Scorer] = {}
    faults = []
    for index, name in enumerate(names):
        if name not in scorers:
            known = f"must be one of {', '.join(scorers)}"
            faults.append(FieldViolation(f"scorers[{index}]", f"is {name[:80]!r}, {known}"))
        elif name in chosen:
            first = list(names).index(name)
            faults.append(
                FieldViolation(
                    f"scorers[{index}]", f"is {name!r}, the same as scorers[{first}]; name each at most once"
                )
            )
        else:
            chosen[name] = scorers[name]
    return ScorerGroup(chosen), tuple(faults)


def read_texts(
    prompts: Sequence[str],
    group: ScorerGroup,
    bounds: AudioBounds,
    faults: Sequence[FieldViolation] = (),
) -> tuple[list[str], Warnings]:
    """Return the prompts, and their warnings. Raises `InvalidInputError` with every violation."""
    with also(faults):
        read = read_prompts(prompts, "prompts", bounds)
    return read, group.prompt_warnings(read)


def write_scores(
    group: ScorerGroup,
    texts: Sequence[NDArray[np.float32]],
    sounds: Sequence[NDArray[np.float32]],
    readable_BP: NDArray[np.bool_],
    warnings: Warnings,
) -> pb.BatchScoreAudioResponse:
    """Return the cosine similarities of prompts and clips by each scorer, from embeddings [B, D].

    Where a prompt is not readable, the score is 0.
    """
    cosines = [(text * sound).sum(-1) for text, sound in zip(texts, sounds, strict=True)]
    scores_BP = np.stack(cosines, axis=1).clip(-1.0, 1.0) * readable_BP
    return pb.BatchScoreAudioResponse(
        scorers=write_scorers(group.members),
        results=[
            pb.AudioScores(scores=row, warnings=of, unread=() if readable_P.all() else ~readable_P)
            for row, readable_P, of in zip(scores_BP, readable_BP, warnings, strict=True)
        ],
    )


def write_embeddings(
    embeddings: Sequence[NDArray[np.float32]], warnings: Warnings
) -> Iterable[pb.Embeddings]:
    """Yield the message of each clip or prompt: its embeddings by all scorers. Takes [B, D] per scorer."""
    for *rows, of in zip(*embeddings, warnings, strict=True):
        yield pb.Embeddings(embeddings=[pb.Embedding(values=row) for row in rows], warnings=of)


def write_scorers(scorers: Mapping[str, Scorer]) -> list[pb.Scorer]:
    """Return the wire's messages of scorers: names, weights, widths and sampling rates."""
    return [
        pb.Scorer(
            name=name,
            model=write_version(scorer.version),
            dimension=scorer.dimension,
            sample_rate_hertz=scorer.sampling_rate,
        )
        for name, scorer in scorers.items()
    ]
