"""The rpcs of captioning.proto: requests from arguments, values from messages."""

from collections.abc import Sequence
from typing import Unpack

from milonga.v1 import captioning_pb2 as pb
from milonga.v1 import captioning_pb2_grpc as rpc
from services.api.captioning import Caption, CaptionCandidate, CaptionOptions, Captions, CaptionTimings
from services.api.scoring import Sound
from services.client.scoring import read_scorer
from services.client.sounds import RequestWriter
from services.client.transport import Service, Unary, whole
from services.wire import read_duration, read_version


def caption_request(clips: Sequence[Sound], **options: Unpack[CaptionOptions]) -> pb.CaptionAudioRequest:
    """Return the message of CaptionAudio.

    Raises:
        InvalidInputError: what the wire can't carry, all at once.
    """
    write = RequestWriter()
    request = pb.CaptionAudioRequest(clips=write.sounds(clips, "clips"))
    for name, value in options.items():
        if name not in CaptionOptions.__annotations__:
            raise TypeError(f"there is no captioning option {name!r}")
        with write.refusing(name, value):
            if name == "beams":
                request.beams.extend(options.get("beams") or ())
            elif value is not None:
                setattr(request, name, value)
    return write.checked(request)


def read_captions(response: pb.CaptionAudioResponse) -> Captions:
    """Read the answer of CaptionAudio."""
    timings = response.timings
    return Captions(
        captions=tuple(_read_caption(caption) for caption in response.captions),
        model=read_version(response.model),
        scorer=read_scorer(response.scorer) if response.HasField("scorer") else None,
        timings=CaptionTimings(
            prepare=read_duration(timings.prepare),
            encode=read_duration(timings.encode),
            generate=read_duration(timings.generate),
            refine=read_duration(timings.refine),
            total=read_duration(timings.total),
        ),
    )


def _read_caption(caption: pb.Caption) -> Caption:
    return Caption(
        text=caption.text,
        candidates=tuple(
            CaptionCandidate(
                text=one.text,
                beams=one.beams,
                log_probability=one.log_probability,
                clap_score=one.clap_score if one.HasField("clap_score") else None,
            )
            for one in caption.candidates
        ),
        warnings=tuple(caption.warnings),
    )


SERVICE = Service(
    name="captioning",
    argument="captioning",
    stub=rpc.CaptioningServiceStub,
    remedy="send less sound at once",
)
CAPTION_AUDIO = Unary(service=SERVICE, method=lambda stub: stub.CaptionAudio, read=read_captions, heavy=True)
GET_CAPTIONER = Unary(service=SERVICE, method=lambda stub: stub.GetCaptioner, read=whole)
