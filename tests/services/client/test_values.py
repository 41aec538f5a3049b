"""Values of other types than a message can hold: errors name their field and type, not their address."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milonga.v1 import generation_pb2 as pb
from services.api.best import check_arguments
from services.api.generation import Clip
from services.client.generation import build_request, stream_request
from services.client.sounds import RequestWriter
from services.errors import InvalidInputError, shown_value


class Thing:
    """An object whose text is its address."""


OBJECTS: tuple[Any, ...] = (
    io.BytesIO(b"x"),
    Thing(),
    Thing,
    lambda: 1,
    {3: Thing()},
    [io.BytesIO()],
    object(),
)
OPTIONS = (
    *("prompt", "negative_prompt", "duration", "clip_count", "seed", "num_inference_steps", "guidance_scale"),
    *("scheduler", "encoding", "sampling_rate", "loudness"),
)


def _write(part: Callable[[RequestWriter], object]) -> None:
    writer = RequestWriter()
    written = part(writer)
    if isinstance(written, Iterator):
        list(written)
    writer.checked(pb.GenerateAudioRequest())


def _generate(name: str, value: Any) -> None:
    options: Any = {"prompt": "a dog barks", name: value}
    build_request(**options)


WIRE_NAMES = {"sampling_rate": "sample_rate_hertz"}
CALLERS: dict[str, Callable[[Any], object]] = {
    **{name: lambda value, name=name: _generate(name, value) for name in OPTIONS},  # type: ignore[misc]
    "preview_interval_steps": lambda value: stream_request(pb.GenerateAudioRequest(), value),
    "prompts[2]": lambda value: _write(lambda writer: writer.text(value, "prompts[2]")),
    "prompts": lambda value: _write(lambda writer: writer.texts(value, "prompts")),
    "clips[2]": lambda value: _write(lambda writer: writer.sound(value, "clips[2]")),
    "clips": lambda value: _write(lambda writer: writer.sounds(value, "clips")),
    "clips[3]": lambda value: _write(
        lambda writer: writer.sound((np.zeros(3, dtype=np.float32), value), "clips[3]")
    ),
    "rank_by": lambda value: check_arguments(4, value, None),
}


@pytest.mark.parametrize("field", CALLERS)
def test_an_error_names_the_type_of_an_object(field: str) -> None:
    for value in OBJECTS:
        with pytest.raises(InvalidInputError) as caught:
            CALLERS[field](value)
        (violation,) = caught.value.violations
        assert violation.field.startswith(WIRE_NAMES.get(field, field))
        message = str(caught.value)
        assert " at 0x" not in message and "<" not in message


def test_texts_and_numbers_are_shown_as_they_are() -> None:
    assert shown_value("a" * 99) == repr("a" * 40)
    assert [shown_value(value) for value in (None, 1.5, True, "\ud800")] == [
        "None",
        "1.5",
        "True",
        r"'\ud800'",
    ]
    assert shown_value(Path("x")) == "of type PosixPath"


def test_durations_of_numpy_are_numbers_and_text_is_none() -> None:
    assert build_request("a dog barks", duration=np.float32(2.5)).duration.seconds == 2  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="duration: is '2', which is not a duration"):
        build_request("a dog barks", duration="2")  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["wav", "flac", "ogg"])
def test_a_damaged_clip_is_refused_by_name(encoding: Any) -> None:
    clip = Clip(audio=b"no sound", encoding=encoding, sampling_rate=16_000, duration=1.0, index=0, seed=0)
    with pytest.raises(
        InvalidInputError, match=f"audio: can't be decoded as {encoding}, it is damaged: "
    ) as caught:
        clip.waveform()
    assert "BytesIO" not in str(caught.value)
