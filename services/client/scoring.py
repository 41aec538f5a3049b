"""The rpcs of scoring.proto: requests from arguments, values from messages. Shapes: B elements, S scorers."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from milonga.v1 import scoring_pb2 as pb
from milonga.v1 import scoring_pb2_grpc as rpc
from services.api.scoring import Embeddings, Scorer, Scores, Sound
from services.client.sounds import RequestWriter
from services.client.transport import Service, Unary, whole
from services.wire import read_version


def score_request(
    pairs: Sequence[tuple[str, Sound]], scorers: Sequence[str] | None
) -> pb.BatchScoreAudioRequest:
    """Return the message of BatchScoreAudio.

    Raises:
        InvalidInputError: what the wire can't carry, all at once; so do the others here.
    """
    write = RequestWriter()
    return write.checked(
        pb.BatchScoreAudioRequest(pairs=write.pairs(pairs, "pairs"), scorers=write.texts(scorers, "scorers"))
    )


def embed_audio_request(clips: Sequence[Sound], scorers: Sequence[str] | None) -> pb.BatchEmbedAudioRequest:
    """Return the message of BatchEmbedAudio."""
    write = RequestWriter()
    return write.checked(
        pb.BatchEmbedAudioRequest(clips=write.sounds(clips, "clips"), scorers=write.texts(scorers, "scorers"))
    )


def embed_text_request(prompts: Sequence[str], scorers: Sequence[str] | None) -> pb.BatchEmbedTextRequest:
    """Return the message of BatchEmbedText."""
    write = RequestWriter()
    return write.checked(
        pb.BatchEmbedTextRequest(
            prompts=write.texts(prompts, "prompts"), scorers=write.texts(scorers, "scorers")
        )
    )


def read_scores(response: pb.BatchScoreAudioResponse) -> Scores:
    """Read the answer of BatchScoreAudio."""
    values_BS = np.array([result.scores for result in response.results], dtype=np.float32)
    shape = len(response.results), len(response.scorers)
    unread = [list(result.unread) or [False] * shape[1] for result in response.results]
    return Scores(
        scorers=tuple(map(read_scorer, response.scorers)),
        values=values_BS.reshape(shape),
        readable=~np.array(unread, dtype=bool).reshape(shape),
        warnings=tuple(tuple(result.warnings) for result in response.results),
    )


def read_embeddings(response: pb.BatchEmbedAudioResponse | pb.BatchEmbedTextResponse) -> Embeddings:
    """Read the answer of BatchEmbedAudio, or of BatchEmbedText."""
    return Embeddings(
        scorers=tuple(map(read_scorer, response.scorers)),
        vectors=tuple(
            _stack(result.embeddings[index] for result in response.results)
            for index in range(len(response.scorers))
        ),
        warnings=tuple(tuple(result.warnings) for result in response.results),
    )


def _stack(embeddings: Iterable[pb.Embedding]) -> NDArray[np.float32]:
    return np.array([embedding.values for embedding in embeddings], dtype=np.float32)


def read_scorer(scorer: pb.Scorer) -> Scorer:
    """Read the message of a scorer."""
    return Scorer(
        name=scorer.name,
        model=read_version(scorer.model),
        dimension=scorer.dimension,
        sampling_rate=scorer.sample_rate_hertz,
    )


SERVICE = Service(
    name="scoring",
    argument="scoring",
    stub=rpc.ScoringServiceStub,
    remedy="send less sound at once",
)
SCORE_AUDIO = Unary(service=SERVICE, method=lambda stub: stub.BatchScoreAudio, read=read_scores, heavy=True)
EMBED_AUDIO = Unary(
    service=SERVICE, method=lambda stub: stub.BatchEmbedAudio, read=read_embeddings, heavy=True
)
EMBED_TEXT = Unary(service=SERVICE, method=lambda stub: stub.BatchEmbedText, read=read_embeddings)
LIST_SCORERS = Unary(service=SERVICE, method=lambda stub: stub.ListScorers, read=whole)
