import math

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from milonga.v1 import audio_pb2
from milonga.v1 import generation_pb2 as pb
from services.api.generation import (
    Defaults,
    GenerationModel,
    GenerationRequest,
    Limits,
    ModelGeometry,
    Preview,
    Progress,
    Queued,
    quantise_mel,
)
from services.api.model import UNVERSIONED
from services.client.generation import read_model
from services.errors import InvalidInputError
from services.generation.convert import read_request, read_stream_request, write_event
from services.wire.generation import write_model

MODEL = GenerationModel(
    model=UNVERSIONED,
    geometry=ModelGeometry(
        sampling_rate=16_000,
        hop_length=160,
        mel_bins=64,
        latent_channels=8,
        latent_downsampling=4,
        duration_grid=0.32,
    ),
    limits=Limits(min_duration=0.04, max_duration=10.24, schedulers=("ddpm", "unipc")),
    defaults=Defaults(
        duration=10.24, num_inference_steps=100, guidance_scale=3.0, scheduler="ddpm", sampling_rate=16_000
    ),
)
REQUEST = GenerationRequest.of("rain", MODEL.defaults, seed=0)


def test_what_is_left_out_takes_the_defaults() -> None:
    request = read_request(pb.GenerateAudioRequest(prompt="rain", seed=0), MODEL)
    assert request == GenerationRequest(
        prompt="rain",
        duration=10.24,
        seed=0,
        num_inference_steps=100,
        guidance_scale=3.0,
        scheduler="ddpm",
        encoding="wav",
        sampling_rate=16_000,
    )


def test_what_is_given_arrives_exactly() -> None:
    message = pb.GenerateAudioRequest(
        prompt="rain",
        negative_prompt="wind",
        duration=Duration(seconds=5, nanos=120_000_000),
        clip_count=3,
        seed=2**64 - 1,
        num_inference_steps=7,
        guidance_scale=0.1,
        scheduler="unipc",
        encoding=audio_pb2.AUDIO_ENCODING_FLAC,
        sample_rate_hertz=44_100,
        loudness=-20.5,
    )
    request = read_stream_request(
        pb.StreamGenerateAudioRequest(request=message, preview_interval_steps=2), MODEL
    )
    assert request == GenerationRequest(
        prompt="rain",
        negative_prompt="wind",
        duration=5.12,
        clip_count=3,
        seed=2**64 - 1,
        num_inference_steps=7,
        guidance_scale=0.1,
        scheduler="unipc",
        encoding="flac",
        sampling_rate=44_100,
        loudness=-20.5,
        preview_interval_steps=2,
    )


def test_an_unknown_encoding_is_refused_by_the_names_of_the_wire() -> None:
    message = pb.GenerateAudioRequest(prompt="rain", encoding=99)  # type: ignore[arg-type]  # an open enum
    with pytest.raises(InvalidInputError, match="encoding: is 99, must be one of AUDIO_ENCODING_WAV"):
        read_request(message, MODEL)


def test_a_model_survives_the_wire() -> None:
    assert read_model(write_model(MODEL)) == MODEL


@pytest.mark.parametrize("zero", ["clip_count", "num_inference_steps", "sample_rate_hertz"])
def test_zero_is_not_the_same_as_left_out(zero: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_request(pb.GenerateAudioRequest(prompt="rain", **{zero: 0}), MODEL)  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [zero]


def test_an_empty_stream_request_names_the_inner_field() -> None:
    with pytest.raises(InvalidInputError, match=r"request\.prompt"):
        read_stream_request(pb.StreamGenerateAudioRequest(), MODEL)


def test_events_become_messages() -> None:
    assert write_event(Queued(position=3), REQUEST, 0.0).queued.position == 3
    progress = write_event(
        Progress(clip_index=1, step=2, num_inference_steps=4, fraction=0.5, seconds_left=None),
        REQUEST,
        0.0,
    ).progress
    assert (progress.clip_index, progress.step, progress.fraction) == (1, 2, 0.5)
    assert not progress.HasField("time_left")


def test_a_preview_is_quantised_between_silence_and_loudest() -> None:
    mel_TM = np.array(
        [[math.log(1e-5), math.log(10), -99.0], [99.0, math.nan, math.log(1e-2)]], dtype=np.float32
    )
    event = Preview(clip_index=0, step=5, mel_TM=quantise_mel(mel_TM))
    preview = write_event(event, REQUEST, 0.0).preview
    assert (preview.frame_count, preview.mel_bin_count, preview.step) == (2, 3, 5)
    levels = list(preview.log_mel)
    assert levels[:4] == [0, 255, 0, 255]
    assert levels[5] in (127, 128)  # half way: 1e-2 is the geometric mean of 1e-5 and 10
