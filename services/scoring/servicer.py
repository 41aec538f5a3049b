"""The rpcs of ScoringService: decode, let the scorers embed, encode."""

from collections.abc import Mapping

from milonga.v1 import scoring_pb2 as pb
from milonga.v1 import scoring_pb2_grpc as rpc
from services.audio.clips import AudioBounds
from services.runtime.offloading import OffLoop
from services.scoring import convert
from services.scoring.scorers import Scorer, together
from services.scoring.settings import ScoringSettings

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["ScoringService"].full_name

Context = object
"""Nothing of the call is read but its message."""


class ScoringServicer(rpc.ScoringServiceServicer):
    """Serves named scorers. Exceptions are mapped by the interceptor."""

    def __init__(self, scorers: Mapping[str, Scorer], settings: ScoringSettings) -> None:
        self.scorers, self.bounds = scorers, AudioBounds(max_batch_size=settings.max_batch_size)
        self._off_loop = OffLoop()
        self._listing = pb.ListScorersResponse(
            scorers=convert.write_scorers(scorers), limits=self.bounds.message(settings.max_request_bytes)
        )

    async def BatchScoreAudio(
        self, request: pb.BatchScoreAudioRequest, context: Context
    ) -> pb.BatchScoreAudioResponse:
        """See scoring.proto."""
        panel, faults = convert.choose(request.scorers, self.scorers)
        panel.check()
        prompts, clips = await self._off_loop(
            lambda: convert.prepare_pairs(request.pairs, panel, self.bounds, faults)
        )
        texts, sounds = await together(panel.embed_text(prompts), panel.embed_audio(clips))
        return convert.write_scores(panel, texts, sounds)

    async def BatchEmbedAudio(
        self, request: pb.BatchEmbedAudioRequest, context: Context
    ) -> pb.BatchEmbedAudioResponse:
        """See scoring.proto."""
        panel, faults = convert.choose(request.scorers, self.scorers)
        panel.check()
        clips = await self._off_loop(lambda: convert.prepare_clips(request.clips, panel, self.bounds, faults))
        sounds = await panel.embed_audio(clips)
        return pb.BatchEmbedAudioResponse(
            scorers=convert.write_scorers(panel.members), results=convert.write_embeddings(sounds)
        )

    async def BatchEmbedText(
        self, request: pb.BatchEmbedTextRequest, context: Context
    ) -> pb.BatchEmbedTextResponse:
        """See scoring.proto."""
        panel, faults = convert.choose(request.scorers, self.scorers)
        texts = await panel.embed_text(convert.check_prompts(request.prompts, self.bounds, faults))
        return pb.BatchEmbedTextResponse(
            scorers=convert.write_scorers(panel.members), results=convert.write_embeddings(texts)
        )

    async def ListScorers(self, request: pb.ListScorersRequest, context: Context) -> pb.ListScorersResponse:
        """See scoring.proto."""
        return self._listing
