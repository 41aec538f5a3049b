"""The rpcs of CaptioningService: decode, describe, refine, encode."""

import time

from milonga.v1 import captioning_pb2 as pb
from milonga.v1 import captioning_pb2_grpc as rpc
from milonga.v1.scoring_pb2 import Scorer as ScorerMessage
from services.api.captioning import (
    MAX_BEAMS,
    MAX_TOTAL_BEAMS,
    PLAIN_BEAMS,
    Caption,
    CaptionDefaults,
    CaptionOptions,
    CaptionRequest,
    Captions,
)
from services.api.scoring import Scorer
from services.audio.clips import write_limits
from services.captioning.model import bounds_of, complete
from services.captioning.refine import ScoringRefiner, refine
from services.captioning.settings import CaptioningSettings
from services.captioning.worker import CallPreparation, CaptionWorker
from services.errors import FieldViolation, InvalidInputError
from services.runtime.callers import current_caller
from services.runtime.decoding import ClipDecoder
from services.wire import write_duration, write_version

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["CaptioningService"].full_name

Context = object
"""The rpcs read only their request, so any context will do."""


class CaptioningServicer(rpc.CaptioningServiceServicer):
    """Serves one captioner. `CallInterceptor` maps exceptions to statuses."""

    def __init__(
        self, worker: CaptionWorker, settings: CaptioningSettings, refiner: ScoringRefiner | None = None
    ) -> None:
        """`refiner`: the scoring service that chooses among candidates, if no CLAP model here does."""
        self.worker, self.bounds = worker, bounds_of(settings.max_batch_size)
        self._refiner = refiner
        self._decoder = ClipDecoder(self.bounds)
        model = worker.model
        self._description = pb.GetCaptionerResponse(
            model=write_version(model.version),
            scorer=None if model.scorer is None else write_scorer(model.scorer),
            refines=model.defaults.can_refine,
            limits=write_limits(self.bounds, settings.max_request_bytes),
            sample_rate_hertz=model.sampling_rate,
            read_duration=write_duration(model.max_seconds),
            refined_beams=model.defaults.beams,
            plain_beams=PLAIN_BEAMS,
            max_new_tokens=model.defaults.max_new_tokens,
            max_beams=MAX_BEAMS,
            max_total_beams=MAX_TOTAL_BEAMS,
        )

    async def CaptionAudio(
        self, request: pb.CaptionAudioRequest, context: Context
    ) -> pb.CaptionAudioResponse:
        """See captioning.proto."""
        start, model = time.monotonic(), self.worker.model
        options, faults = read_options(request, model.defaults)
        with self.worker.batcher.expect(len(request.clips)):
            preparation = CallPreparation(worker=self.worker, request=options)
            clips = await self._decoder.clips(request.clips, preparation, faults)
            del request  # its clips are no longer needed
            prepared = time.monotonic()
            drafts = await self.worker.describe(clips, options)
        described = time.monotonic()
        refined = await refine(
            model, self._refiner, options, clips, drafts, deadline=current_caller().deadline
        )
        end = time.monotonic()
        captions = complete(
            model,
            options,
            clips,
            drafts,
            refined,
            prepare=prepared - start,
            refine=end - described,
            total=end - start,
        )
        return write_captions(captions)

    async def GetCaptioner(
        self, request: pb.GetCaptionerRequest, context: Context
    ) -> pb.GetCaptionerResponse:
        """See captioning.proto."""
        return self._description


def read_options(
    request: pb.CaptionAudioRequest, defaults: CaptionDefaults
) -> tuple[CaptionRequest, tuple[FieldViolation, ...]]:
    """Return the options of a call, and their violations; with violations the options are the defaults."""
    options: CaptionOptions = {
        "beams": request.beams,
        "refine": request.refine if request.HasField("refine") else None,
        "max_new_tokens": request.max_new_tokens,
        "max_candidates": request.max_candidates,
    }
    try:
        return CaptionRequest.of(defaults, **options), ()
    except InvalidInputError as error:
        return CaptionRequest.of(defaults), error.violations


def write_captions(captions: Captions) -> pb.CaptionAudioResponse:
    """Return the answer of CaptionAudio."""
    timings = captions.timings
    return pb.CaptionAudioResponse(
        captions=map(write_caption, captions.captions),
        model=write_version(captions.model),
        scorer=None if captions.scorer is None else write_scorer(captions.scorer),
        timings=pb.CaptionTimings(
            prepare=write_duration(timings.prepare),
            encode=write_duration(timings.encode),
            generate=write_duration(timings.generate),
            refine=write_duration(timings.refine),
            total=write_duration(timings.total),
        ),
    )


def write_caption(caption: Caption) -> pb.Caption:
    """Return the wire's message of a caption."""
    candidates = [
        pb.CaptionCandidate(
            text=one.text, beams=one.beams, log_probability=one.log_probability, clap_score=one.clap_score
        )
        for one in caption.candidates
    ]
    return pb.Caption(text=caption.text, candidates=candidates, warnings=caption.warnings)


def write_scorer(scorer: Scorer) -> ScorerMessage:
    """Return the wire's message of a scorer."""
    return ScorerMessage(
        name=scorer.name,
        model=write_version(scorer.model),
        dimension=scorer.dimension,
        sample_rate_hertz=scorer.sampling_rate,
    )
