"""Sound files, lists, model URIs, tokens and files of callers, mutated: each is read, or refused."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from services.audio.decoding import AudioBounds, decode, measure
from services.errors import InvalidInputError
from services.generation.operator import read_uri
from services.lists import read_list
from services.runtime.callers import peer_host
from services.runtime.callers_file import read_callers
from services.runtime.tokens import check_token, token_digest
from services.weights.uri import ModelURI
from tests.fuzz.fuzzing import mutated, mutated_text, run, text
from tests.services.audio.sounds import file_of, tone, with_flac_length, with_wav_length

SOUNDS: Final = (
    *(file_of(tone(0.5, channels=channels), kind=kind, subtype=subtype) for kind, subtype, channels in (
        ("WAV", "PCM_16", 1), ("WAV", "PCM_24", 2), ("WAV", "FLOAT", 1), ("WAVEX", "PCM_16", 2),
        ("RF64", "PCM_16", 1), ("W64", "PCM_16", 1), ("AIFF", "PCM_16", 1), ("AU", "PCM_16", 1),
        ("CAF", "PCM_16", 1), ("FLAC", "PCM_16", 1), ("FLAC", "PCM_24", 2), ("OGG", "VORBIS", 1),
        ("OGG", "OPUS", 1), ("MP3", "MPEG_LAYER_III", 1), ("WAV", "IMA_ADPCM", 1), ("WAV", "ULAW", 1),
    )),
    with_wav_length(file_of(tone(0.5)), 0x7FFF_F000),
    with_flac_length(file_of(tone(0.5), kind="FLAC"), 0),
    b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + file_of(tone(0.5), kind="FLAC"),
)  # fmt: skip
ROWS: Final = [
    {"caption": 'A man says "hello", then a dog barks', "location": "a.wav"},
    {"caption": "Rain falls\nwhile thunder rumbles", "location": "b.wav"},
]
LISTS: Final = {
    "a.csv": 'caption,location\n"A man says ""hello"", then a dog barks",a.wav\n"Rain\nfalls",b.wav\n',
    "a.tsv": "caption\tlocation\nA dog barks\ta.wav\nRain falls\tb.wav\n",
    "clotho.csv": "file_name,caption_1,caption_2\na.wav,A dog barks,A dog\nb.wav,Rain,It rains\n",
    "a.jsonl": "\n".join(map(json.dumps, ROWS)),
    "a.json": json.dumps(ROWS),
    "wavcaps.json": json.dumps({"num_captions_per_audio": 1, "data": ROWS}),
    "a.txt": "A dog barks\nRain falls\n",
}
URIS: Final = (
    "mini", "mini:clap-a", "mini-base", "file:/models/a", "file:a", "hf:owner/name@main", "laion:/a.pt",
    "models:/name/7", "models:/name@champion#sha256:" + "0" * 64, "laion-clap:/b.pt",
)  # fmt: skip
CALLERS: Final = f"""[callers.studio]
roles = ["caller"]
tokens = ["{token_digest("a")}", "{token_digest("b")}"]
calls_per_minute = 600

[callers."render.farm"]
roles = ["batch", "observer"]
identities = ["spiffe://example.org/farm"]
work_per_minute = 1e5
"""


def _reads_or_refuses(read: Callable[[], object]) -> bool:
    """Return whether it reads; a refusal must name something, in one line."""
    try:
        read()
    except InvalidInputError as error:
        refused = error
    else:
        return True
    assert refused.violations
    assert "\n" not in str(refused)
    return False


def test_sound_files() -> None:
    read = []

    def check(audio: object) -> None:
        assert isinstance(audio, bytes)
        clips = []
        seconds, samples = measure(audio, AudioBounds(max_seconds=30.0))
        assert 0.0 <= seconds <= 31.0
        if _reads_or_refuses(lambda: clips.append(decode(audio, "audio", AudioBounds(max_seconds=30.0)))):
            (clip,) = clips
            assert np.isfinite(clip.waveform).all()
            assert np.abs(clip.waveform).max(initial=0.0) <= 1.0
            assert clip.seconds <= 30.0
            assert samples >= clip.waveform.size
            read.append(len(audio))

    for sound in SOUNDS:
        check(sound)
    run("sounds", 4_000, lambda rng: mutated(rng, rng.choice(SOUNDS), SOUNDS), check)
    assert read


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


def test_lists(tmp_path: Path) -> None:
    files = {name: content.encode() for name, content in LISTS.items()} | {"a.parquet": _parquet()}

    def make(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(tuple(files))
        content = files[name]
        if rng.random() < 0.5 and name != "a.parquet":
            return name, mutated_text(rng, content.decode()).encode()
        return name, mutated(rng, content, tuple(files.values()))

    def check(made: object) -> None:
        assert isinstance(made, tuple)
        name, content = made
        path = tmp_path / name
        path.write_bytes(content)
        _reads_or_refuses(lambda: read_list(path, "--prompts"))
        _reads_or_refuses(lambda: read_list(path, "--pairs", clip="needed", keep_unusable=True))
        _reads_or_refuses(lambda: read_list(path, "--prompts", clip="ignored", checked=False))

    run("lists", 600, make, check)


def test_model_uris() -> None:
    def check(uri: object) -> None:
        assert isinstance(uri, str)
        _reads_or_refuses(lambda: ModelURI.parse(uri))
        _reads_or_refuses(lambda: read_uri(uri, ("mini", "models:/name", "hf:owner", "file:/models")))

    for uri in URIS:
        ModelURI.parse(uri)
    run("uris", 4_000, lambda rng: mutated_text(rng, rng.choice(URIS)), check)


def test_tokens_and_peers() -> None:
    def check(made: object) -> None:
        assert isinstance(made, str)
        if _reads_or_refuses(lambda: check_token("token", made)):
            assert token_digest(check_token("token", made)).startswith("sha256:")
        else:
            with pytest.raises(InvalidInputError) as caught:
                check_token("token", made)
            assert len(made) < 8 or made not in str(caught.value)
        assert peer_host(f"ipv4:{made}")
        assert peer_host(made)

    run("tokens", 4_000, lambda rng: mutated_text(rng, rng.choice((text(rng), "milonga_" + "a" * 43))), check)


def test_files_of_callers(tmp_path: Path) -> None:
    path = tmp_path / "callers.toml"

    def make(rng: random.Random) -> bytes:
        changed = mutated_text(rng, CALLERS).encode()
        return changed if rng.random() < 0.7 else mutated(rng, CALLERS.encode())

    def check(content: object) -> None:
        assert isinstance(content, bytes)
        path.write_bytes(content)
        _reads_or_refuses(lambda: read_callers(path))

    path.write_text(CALLERS)
    assert len(read_callers(path)) == 2
    run("callers", 400, make, check)
