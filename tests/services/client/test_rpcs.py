import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milonga.v1 import audio_pb2
from services.audio.encoding import encode_audio
from services.client import (
    MAX_REQUEST_BYTES,
    AsyncAudioClient,
    AudioClient,
    Clip,
    ModelVersion,
    Reward,
    Scorer,
    sounds,
)
from services.errors import InvalidInputError
from tests.services.client.serving import Told, ask

TOLD = ModelVersion(name="told", version="3", digest="sha256:abc", license="Apache-2.0")
A, B = (Scorer(name=name, model=TOLD, dimension=2, sampling_rate=48_000) for name in ("a", "b"))


def _clip(audio: bytes, encoding: str = "flac") -> Clip:
    return Clip(audio=audio, encoding=encoding, sampling_rate=16_000, duration=1.0, index=0, seed=0)


def test_both_faces_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(AudioClient) == methods(AsyncAudioClient)


def test_scores_have_a_row_for_each_pair(face: str, told: Told, target: str) -> None:
    pairs = [("rain", bytes([50])), ("a bell", bytes([20]))]
    scores = ask(face, lambda client: client.score_audio(pairs, scorers=["a", "b"]), target)
    assert scores.scorers == (A, B)
    assert scores.values.dtype == np.float32
    np.testing.assert_allclose(scores.values, [[0.5, 0.25], [0.2, 0.1]], rtol=1e-6)
    (request,) = told.requests
    sent: Any = request
    assert ([pair.prompt for pair in sent.pairs], list(sent.scorers)) == (["rain", "a bell"], ["a", "b"])


def test_embeddings_have_a_matrix_for_each_scorer(face: str, target: str) -> None:
    by_sound = ask(face, lambda client: client.embed_audio([b"x", b"y", b"z"]), target)
    by_text = ask(face, lambda client: client.embed_text(["rain", "a bell", "wind"]), target)
    for embeddings in (by_sound, by_text):
        assert embeddings.scorers == (A, B)
        first, second = embeddings.vectors
        assert first.dtype == np.float32
        assert (first.tolist(), second.tolist()) == ([[0, 0], [1, 0], [2, 0]], [[0, 1], [1, 1], [2, 1]])


def test_rewards_come_in_the_order_of_the_pairs(face: str, target: str) -> None:
    pairs = [("rain", bytes([5])), ("rain", bytes([9]))]
    rewards = ask(face, lambda client: client.compute_rewards(pairs), target)
    assert rewards.model == TOLD
    assert rewards.rewards == (Reward(logit=5.0, probability=0.5), Reward(logit=9.0, probability=0.5))


def test_a_ranking_names_the_clips_of_the_call(face: str, target: str) -> None:
    clips = [bytes([5]), bytes([9]), bytes([7])]
    ranking = ask(face, lambda client: client.rank_audio("rain", clips), target)
    assert ranking.model == TOLD
    assert [(place.index, place.reward.logit, place.beats_next) for place in ranking.places] == [
        (1, 9.0, 0.75), (2, 7.0, 0.75), (0, 5.0, None),
    ]  # fmt: skip


def test_services_say_what_they_serve(face: str, target: str) -> None:
    assert ask(face, lambda client: client.get_model(), target).limits.max_clip_count == 3
    assert [s.name for s in ask(face, lambda client: client.list_scorers(), target).scorers] == ["a", "b"]
    assert ask(face, lambda client: client.get_reward_model(), target).limits.max_batch_size == 4


def test_every_kind_of_sound_arrives(face: str, told: Told, target: str, tmp_path: Path) -> None:
    file = tmp_path / "clip.wav"
    file.write_bytes(b"RIFF of a file")
    left_N, right_N = np.array([0.1, 0.2, 0.3], np.float32), np.array([-0.1, -0.2, -0.3], np.float32)
    sounds = [
        _clip(b"fLaC"),
        b"RIFF of bytes",
        file,
        (left_N, 16_000),
        (np.stack([left_N, right_N]), 44_100),
        (np.stack([left_N, right_N])[:, ::2], np.int64(44_100)),
    ]
    ask(face, lambda client: client.embed_audio(sounds), target)
    (request,) = told.requests
    sent: Any = request
    clip, content, path, mono, stereo, strided = sent.clips
    assert clip == audio_pb2.Clip(
        audio=b"fLaC", encoding=audio_pb2.AUDIO_ENCODING_FLAC, sample_rate_hertz=16_000
    )
    assert content == audio_pb2.Clip(audio=b"RIFF of bytes")
    assert path == audio_pb2.Clip(audio=b"RIFF of a file")
    assert (mono.sample_rate_hertz, mono.channel_count, mono.audio) == (16_000, 1, left_N.tobytes())
    assert (stereo.sample_rate_hertz, stereo.channel_count) == (44_100, 2)
    assert stereo.encoding == audio_pb2.AUDIO_ENCODING_FLOAT32
    interleaved = np.frombuffer(stereo.audio, "<f4").reshape(3, 2)
    np.testing.assert_array_equal(interleaved, np.stack([left_N, right_N], axis=1))
    np.testing.assert_array_equal(np.frombuffer(strided.audio, "<f4"), interleaved[::2].ravel())


def test_a_generated_clip_is_sent_on_as_it_is(face: str, told: Told, target: str) -> None:
    audio = encode_audio(np.zeros(800, np.float32), 16_000, "linear16")
    ask(face, lambda client: client.compute_rewards([("rain", _clip(audio, "linear16"))]), target)
    (request,) = told.requests
    sent: Any = request
    expected = audio_pb2.Clip(
        audio=audio, encoding=audio_pb2.AUDIO_ENCODING_LINEAR16, sample_rate_hertz=16_000
    )
    assert (sent.pairs[0].prompt, sent.pairs[0].clip) == ("rain", expected)


def test_what_the_wire_cannot_carry_is_refused_element_by_element(face: str, target: str) -> None:
    absent = Path("/absent/clip.wav")
    clips: list[Any] = [
        b"good",
        absent,
        b"",
        "clip.wav",
        (np.zeros(3), 16_000),
        (np.zeros((1, 2, 3), np.float32), 16_000),
        (np.zeros((2, 0), np.float32), 16_000),
        (np.zeros(3, np.float32), 16_000.5),
        (np.zeros(3, np.float32), 2**40),
        _clip(b"", "wav"),
        _clip(b"x", "unknown"),
    ]
    with pytest.raises(InvalidInputError) as caught:
        ask(face, lambda client: client.embed_audio(clips), target)
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert list(found) == [f"clips[{index}]" for index in range(1, len(clips))]
    assert found["clips[1]"] == "is /absent/clip.wav, which can't be read: No such file or directory"
    assert "empty" in found["clips[2]"]
    assert found["clips[3]"].startswith("is of type str, must be a Clip, bytes, a Path")
    assert "float64, must be float32" in found["clips[4]"]
    assert "shape [1, 2, 3], must be [N] or [channels, N]" in found["clips[5]"]
    with pytest.raises(InvalidInputError) as caught:
        ask(face, lambda client: client.score_audio([("rain", b"x"), ("\ud800", absent)]), target)
    assert [v.field for v in caught.value.violations] == ["pairs[1].prompt", "pairs[1].clip"]


def test_one_string_is_no_list_of_prompts(face: str, target: str) -> None:
    for call, field in (
        (lambda client: client.embed_text("rain"), "prompts"),
        (lambda client: client.embed_text(["rain"], scorers="ab"), "scorers"),
        (lambda client: client.embed_audio(b"RIFF"), "clips"),
    ):
        with pytest.raises(InvalidInputError, match="must be a list") as caught:
            ask(face, call, target)
        assert [violation.field for violation in caught.value.violations] == [field]


def test_what_exceeds_a_message_is_named_before_it_is_copied(face: str, target: str) -> None:
    # Never touched, so that they take no memory.
    minutes = (np.zeros((2, MAX_REQUEST_BYTES // 16), np.float32), 48_000)
    with pytest.raises(InvalidInputError, match="at most 255 MiB") as caught:
        ask(face, lambda client: client.embed_audio([minutes] * 3), target)
    assert [violation.field for violation in caught.value.violations] == ["clips[2]"]


def test_a_file_is_not_read_beyond_what_can_be_sent(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "MAX_REQUEST_BYTES", 2**20)
    with pytest.raises(InvalidInputError, match="at most 1 MiB") as caught:
        ask(face, lambda client: client.embed_audio([b"x", Path("/dev/zero")]), "127.0.0.1:1")
    assert [violation.field for violation in caught.value.violations] == ["clips[1]"]


def test_a_minute_of_stereo_passes(face: str, told: Told, target: str) -> None:
    minute = (np.zeros((2, 60 * 48_000), np.float32), 48_000)
    ask(face, lambda client: client.compute_rewards([("rain", minute)]), target)
    assert told.requests[0].ByteSize() > 23_000_000
