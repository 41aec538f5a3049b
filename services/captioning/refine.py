"""CLAP-Refine by a scoring service: it embeds clips and candidates, and their cosines choose."""

import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from milonga.v1.scoring_pb2 import ListScorersResponse
from services.api.captioning import CaptionCandidate, CaptionRequest
from services.api.scoring import Embeddings, Scorer, Sound
from services.captioning.model import CaptionModel, Draft, Drafts, PreparedClip, scorable_texts, with_scores
from services.errors import DeadlineExceededError, MilongaError, QueueFullError, ServiceUnavailableError
from services.runtime import tracing

Item = TypeVar("Item")


async def refine(
    model: CaptionModel,
    refiner: "ScoringRefiner | None",
    request: CaptionRequest,
    clips: Sequence[PreparedClip],
    drafts: Sequence[Draft],
    deadline: float | None = None,
) -> tuple[Drafts, Scorer | None]:
    """Return the candidates of each clip, with scores if the call is refined, and the scorer.

    Those that `model` has refined have their scores already. Raises as `ScoringRefiner.score`.
    """
    candidates = [draft.candidates for draft in drafts]
    if not request.refine:
        return candidates, None
    if refiner is None:
        return candidates, model.scorer
    sounds = [clip.sound for clip in clips if clip.sound is not None]
    with tracing.span("refine", clips=len(clips)):
        return await refiner.score(candidates, sounds, deadline)


class ScoringClient(Protocol):
    """What is used of `AsyncAudioClient`."""

    async def list_scorers(self, *, timeout: float | None = None) -> ListScorersResponse:
        """Return the scorers, and the limits of a call."""

    async def embed_audio(
        self, clips: Sequence[Sound], *, scorers: Sequence[str] | None = None, timeout: float | None = None
    ) -> Embeddings:
        """Return the embeddings of sounds."""

    async def embed_text(
        self, prompts: Sequence[str], *, scorers: Sequence[str] | None = None, timeout: float | None = None
    ) -> Embeddings:
        """Return the embeddings of prompts."""

    async def close(self) -> None:
        """Close the connection."""


class ScoringRefiner:
    """Scores candidates by one scorer of a scoring service."""

    def __init__(self, client: ScoringClient, scorer: str | None = None) -> None:
        """`scorer`: name of the scorer; None: the service's first."""
        self._client, self._name = client, scorer

    async def score(
        self,
        drafts: Sequence[Sequence[CaptionCandidate]],
        sounds: Sequence[Sound],
        deadline: float | None = None,
    ) -> tuple[Drafts, Scorer]:
        """Return the candidates with their CLAP scores, and the scorer.

        Args:
            drafts: candidates of each clip.
            sounds: the clips.
            deadline: on the clock of `time.monotonic`.

        Raises:
            QueueFullError: the scoring service has no room.
            DeadlineExceededError: the deadline passed.
            ServiceUnavailableError: anything else went wrong there, which is no fault of the caller.
        """
        try:
            return await self._score(drafts, sounds, deadline)
        except (QueueFullError, DeadlineExceededError):
            raise
        except MilongaError as error:
            raise ServiceUnavailableError(
                f"the scoring service that chooses among candidates: {error}; refine=false needs none"
            ) from error

    async def close(self) -> None:
        """Close the connection to the scoring service."""
        await self._client.close()

    async def _score(
        self, drafts: Sequence[Sequence[CaptionCandidate]], sounds: Sequence[Sound], deadline: float | None
    ) -> tuple[Drafts, Scorer]:
        served = await self._client.list_scorers(timeout=_left(deadline))
        names, most = [self._name or served.scorers[0].name], served.limits.max_batch_size
        texts = scorable_texts(drafts)
        of_sounds = [
            await self._client.embed_audio(part, scorers=names, timeout=_left(deadline))
            for part in _parts(sounds, most)
        ]
        of_texts = [
            await self._client.embed_text(part, scorers=names, timeout=_left(deadline))
            for part in _parts(texts, most)
        ]
        scorer = of_sounds[0].scorers[0]
        if any(one.scorers[0].model != scorer.model for one in (*of_sounds, *of_texts)):
            raise ServiceUnavailableError("it changed its model during the call; try again")
        embeddings = dict(zip(texts, _joined(of_texts), strict=True)) if texts else {}
        pairs = zip(drafts, _joined(of_sounds), strict=True)
        return [with_scores(draft, audio_D, embeddings) for draft, audio_D in pairs], scorer


def _joined(answers: Sequence[Embeddings]) -> NDArray[np.float32]:
    return np.concatenate([one.vectors[0] for one in answers])


def _parts(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    return [items[start : start + most] for start in range(0, len(items), most)]


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
