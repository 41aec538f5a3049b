import math

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from milonga.v1 import generation_pb2 as pb
from services.engine import GenerationRequest, Limits, Preview, Progress, Queued
from services.errors import InvalidInputError
from services.generation.convert import (
    Defaults,
    OutputFormat,
    Reading,
    read_request,
    read_stream_request,
    write_event,
)

READING: Reading = {
    "limits": Limits(min_duration=0.04, max_duration=10.24, schedulers=("ddpm", "unipc")),
    "defaults": Defaults(duration=10.24, num_inference_steps=100, guidance_scale=3.0, scheduler="ddpm"),
    "sampling_rate": 16_000,
}


def test_what_is_left_out_takes_the_defaults() -> None:
    request, output = read_request(pb.GenerateAudioRequest(prompt="rain", seed=0), **READING)
    assert request == GenerationRequest(
        prompt="rain",
        duration=10.24,
        seed=0,
        num_inference_steps=100,
        guidance_scale=3.0,
        scheduler="ddpm",
    )
    assert output == OutputFormat(encoding="wav", sampling_rate=16_000)


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
        sample_rate_hertz=44_100,
    )
    request, output = read_stream_request(
        pb.StreamGenerateAudioRequest(request=message, preview_interval_steps=2), **READING
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
        preview_interval_steps=2,
    )
    assert output.sampling_rate == 44_100


@pytest.mark.parametrize("zero", ["clip_count", "num_inference_steps", "sample_rate_hertz"])
def test_zero_is_not_the_same_as_left_out(zero: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_request(pb.GenerateAudioRequest(prompt="rain", **{zero: 0}), **READING)  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [zero]


def test_an_empty_stream_request_names_the_inner_field() -> None:
    with pytest.raises(InvalidInputError, match=r"request\.prompt"):
        read_stream_request(pb.StreamGenerateAudioRequest(), **READING)


def test_events_become_messages() -> None:
    assert write_event(Queued(position=3)).queued.position == 3
    progress = write_event(
        Progress(clip_index=1, step=2, num_inference_steps=4, fraction=0.5, seconds_left=None)
    ).progress
    assert (progress.clip_index, progress.step, progress.fraction) == (1, 2, 0.5)
    assert not progress.HasField("time_left")


def test_a_preview_is_quantised_between_silence_and_loudest() -> None:
    mel_TM = np.array(
        [[math.log(1e-5), math.log(10), -99.0], [99.0, math.nan, math.log(1e-2)]], dtype=np.float32
    )
    preview = write_event(Preview(clip_index=0, step=5, mel_TM=mel_TM)).preview
    assert (preview.frame_count, preview.mel_bin_count, preview.step) == (2, 3, 5)
    levels = list(preview.log_mel)
    assert levels[:4] == [0, 255, 0, 255]
    assert levels[5] in (127, 128)  # half way: 1e-2 is the geometric mean of 1e-5 and 10
