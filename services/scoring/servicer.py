"""The rpcs of ScoringService: decode, let the scorers embed, encode."""

from collections.abc import Mapping

from milonga.v1 import scoring_pb2 as pb
from milonga.v1 import scoring_pb2_grpc as rpc
from services.audio.clips import AudioBounds
from services.runtime.offloading import OffLoop
from services.scoring import convert
from services.scoring.scorers import Scorer, together

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["ScoringService"].full_name

Context = object
"""Of the call itself nothing is looked at."""


class ScoringServicer(rpc.ScoringServiceServicer):
    """Serves named scorers. Exceptions are mapped by the interceptor."""

    def __init__(self, scorers: Mapping[str, Scorer], bounds: AudioBounds, *, max_request_bytes: int) -> None:
        self._scorers, self._bounds = scorers, bounds
        self._off_loop = OffLoop()
        self._listing = pb.ListScorersResponse(
            scorers=convert.write_scorers(scorers), limits=bounds.message(max_request_bytes)
        )

    async def BatchScoreAudio(
        self, request: pb.BatchScoreAudioRequest, context: Context
    ) -> pb.BatchScoreAudioResponse:
        """See scoring.proto."""
        panel, faults = convert.choose(request.scorers, self._scorers)
        panel.check()
        prompts, heard = await self._off_loop(
            lambda: convert.hear_pairs(request.pairs, panel, self._bounds, faults)
        )
        texts, sounds = await together(panel.embed_text(prompts), panel.embed_audio(heard))
        return convert.write_scores(panel, texts, sounds)

    async def BatchEmbedAudio(
        self, request: pb.BatchEmbedAudioRequest, context: Context
    ) -> pb.BatchEmbedAudioResponse:
        """See scoring.proto."""
        panel, faults = convert.choose(request.scorers, self._scorers)
        panel.check()
        heard = await self._off_loop(lambda: convert.hear_clips(request.clips, panel, self._bounds, faults))
        sounds = await panel.embed_audio(heard)
        return pb.BatchEmbedAudioResponse(
            scorers=convert.write_scorers(panel.members), results=convert.write_embeddings(sounds)
        )

    async def BatchEmbedText(
        self, request: pb.BatchEmbedTextRequest, context: Context
    ) -> pb.BatchEmbedTextResponse:
        """See scoring.proto."""
        panel, faults = convert.choose(request.scorers, self._scorers)
        texts = await panel.embed_text(convert.check_prompts(request.prompts, self._bounds, faults))
        return pb.BatchEmbedTextResponse(
            scorers=convert.write_scorers(panel.members), results=convert.write_embeddings(texts)
        )

    async def ListScorers(self, request: pb.ListScorersRequest, context: Context) -> pb.ListScorersResponse:
        """See scoring.proto."""
        return self._listing
