"""Signed clips: what they state, what is found when they were changed, and wrong certificates."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services import cli
from services.api.model import ModelVersion
from services.audio.encoding import decode_audio, encode_audio
from services.errors import InvalidInputError
from services.provenance import SIGNABLE
from services.provenance.reading import read_provenance
from services.provenance.signing import ClipSigner, Origin
from services.weights.lineage import Lineage
from tests.services.generation.serving import Serving, serving, tiny_engine
from tests.services.provenance.certificates import Identity, identity
from tests.services.web.hosting import calling, faults, hosting_web

MODEL = ModelVersion(name="tiny", version="1", digest="sha256:" + "0" * 64, license="Apache-2.0")
ORIGIN = Origin(prompt="a dog barks", model=MODEL, seed=2**63 + 1, clip_index=2)
SOUND_N = (0.4 * np.sin(np.arange(16_000) * 0.1)).astype(np.float32)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return identity(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def signer(studio: Identity) -> ClipSigner:
    return ClipSigner(studio.chain, studio.key)


@pytest.fixture(scope="module")
def generating() -> Iterator[Serving]:
    with tiny_engine() as engine, serving(engine) as generating:
        yield generating


def test_the_runs_of_a_registry_are_stated_where_they_are_known(studio: Identity) -> None:
    runs = {"training_run": "a1", "ledger_run": "b2"}
    plain = encode_audio(SOUND_N, 16_000, "wav")
    for known, stated in ((runs, runs), ({}, None)):
        signer = ClipSigner(studio.chain, studio.key, runs_of=lambda model, known=known: known)  # type: ignore[misc]
        found = read_provenance(signer.sign(plain, "wav", ORIGIN))
        assert found is not None
        assert found.generation.get("registry") == stated


def test_a_registry_that_is_away_delays_no_clip_for_long_and_is_asked_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lineage = Lineage("http://127.0.0.1:9")
    assert lineage(MODEL) == lineage(MODEL) == {}
    assert [record.name for record in caplog.records].count("services.weights.lineage") == 1


@pytest.mark.parametrize("encoding", SIGNABLE)
def test_a_signed_clip_says_what_made_it_and_keeps_every_sample(
    signer: ClipSigner, studio: Identity, encoding: str
) -> None:
    plain = encode_audio(SOUND_N, 16_000, encoding)
    signed = signer.sign(plain, encoding, ORIGIN)
    before, after = (decode_audio(audio, encoding, 16_000)[0] for audio in (plain, signed))
    np.testing.assert_array_equal(before, after)
    found = read_provenance(signed)
    assert found is not None
    assert (found.state, found.signer, found.ai_generated, found.faults) == (
        "valid",
        "Example Studio",
        True,
        (),
    )
    assert found.generator.startswith("milonga ")
    assert found.generation["model"]["digest"] == MODEL.digest
    assert (found.generation["seed"], found.generation["clip_index"]) == (str(2**63 + 1), 2)
    assert found.generation["prompt_sha256"] == hashlib.sha256(b"a dog barks").hexdigest()
    assert "prompt" not in found.generation
    trusted = read_provenance(signed, authorities=studio.authority.read_text())
    assert trusted is not None
    assert trusted.state == "trusted"


def test_the_prompt_is_stated_only_if_asked(studio: Identity) -> None:
    signer = ClipSigner(studio.chain, studio.key, with_prompt=True)
    found = read_provenance(signer.sign(encode_audio(SOUND_N, 16_000), "wav", ORIGIN))
    assert found is not None
    assert found.generation["prompt"] == "a dog barks"


@pytest.mark.parametrize("encoding", SIGNABLE)
def test_a_changed_sound_is_found(signer: ClipSigner, encoding: str) -> None:
    signed = bytearray(signer.sign(encode_audio(SOUND_N, 16_000, encoding), encoding, ORIGIN))
    place = len(signed) // 3 if encoding == "wav" else len(signed) - 300
    signed[place] ^= 1
    found = read_provenance(bytes(signed))
    assert found is not None
    assert (found.state, found.faults) == ("invalid", ("the sound was changed after it was signed",))


def test_a_changed_statement_is_found(signer: ClipSigner) -> None:
    signed = signer.sign(encode_audio(SOUND_N, 16_000), "wav", ORIGIN)
    assert signed.count(b"Apache-2.0") == 1
    found = read_provenance(signed.replace(b"Apache-2.0", b"Apache-1.0"))
    assert found is not None
    assert found.state == "invalid"
    assert found.faults


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read"),
        (b"", "holds no certificate in PEM"),
        (b"\xff\xfe no text", "holds no certificate in PEM"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds no certificate in PEM"),
    ],
)
def test_authorities_that_are_none_are_named_where_they_are_given(
    studio: Identity, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, says: str
) -> None:
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_bytes(content)
    clip = tmp_path / "clip.wav"
    clip.write_bytes(encode_audio(SOUND_N, 16_000))
    assert cli.run(["verify", str(clip), "--trust", str(path)]) == 2
    assert f"--trust: is {path}, which {says}" in capsys.readouterr().err
    with (
        pytest.raises(InvalidInputError, match=f"trusted_signers: is .* which {says}"),
        hosting_web(generation="127.0.0.1:1", trusted_signers=path),
    ):
        pass


def test_another_authority_does_not_make_it_trusted(signer: ClipSigner, tmp_path: Path) -> None:
    other = identity(tmp_path / "other")
    signed = signer.sign(encode_audio(SOUND_N, 16_000), "wav", ORIGIN)
    found = read_provenance(signed, authorities=other.authority.read_text())
    assert found is not None
    assert found.state == "valid"


def test_what_has_no_manifest_or_can_not_hold_one() -> None:
    assert read_provenance(encode_audio(SOUND_N, 16_000, "flac")) is None
    for audio, says in ((encode_audio(SOUND_N, 16_000, "ogg"), "which holds no manifest"), (b"x", "no WAV")):
        with pytest.raises(InvalidInputError, match=says):
            read_provenance(audio)


def test_ed25519_keys_sign_too(tmp_path: Path) -> None:
    one = identity(tmp_path, kind="ed25519")
    found = read_provenance(ClipSigner(one.chain, one.key).sign(encode_audio(SOUND_N, 16_000), "wav", ORIGIN))
    assert found is not None
    assert found.state == "valid"


def test_wrong_certificates_are_refused_at_the_start(studio: Identity, tmp_path: Path) -> None:
    other, expired = identity(tmp_path / "other"), identity(tmp_path / "expired", days=-1)
    text = tmp_path / "text.pem"
    text.write_text("none")
    for chain, key, says in (
        (tmp_path / "absent.pem", studio.key, "can't be read"),
        (text, studio.key, "holds no certificate"),
        (studio.chain, text, "holds no usable private key"),
        (studio.chain, other.key, "not the key of the first certificate"),
        (expired.chain, expired.key, "can't sign"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            ClipSigner(chain, key)


# The commands


def test_generate_signs_and_verify_tells(
    generating: Serving, studio: Identity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clip.flac"
    made = ["generate", "a dog barks", "-o", str(output), "--server", generating.target, "--seed", "7", "-q"]
    signing = ["--sign-cert", str(studio.chain), "--sign-key", str(studio.key)]
    assert cli.run([*made, *signing]) == 0
    assert cli.run(["verify", str(output), "--trust", str(studio.authority)]) == 0
    out = capsys.readouterr().out
    assert f"{output}: trusted, signed by Example Studio" in out
    assert "seed: 7" in out
    assert cli.run(["verify", "--json", str(output)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["manifest"]["generation"]["model"]["name"] == "tiny"
    content = bytearray(output.read_bytes())
    content[-50] ^= 1
    output.write_bytes(content)
    assert cli.run(["verify", str(output)]) == 2
    assert "the sound was changed after it was signed" in capsys.readouterr().err


def test_many_clips_are_signed_as_one(generating: Serving, studio: Identity, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a dog barks"}\n{"prompt": "a siren wails"}\n')
    signing = ["--sign-cert", str(studio.chain), "--sign-key", str(studio.key)]
    command = ["generate", "--prompts", str(prompts), "-o", str(tmp_path / "clips"), "-q", *signing]
    assert cli.run([*command, "--server", generating.target]) == 0
    clips = sorted((tmp_path / "clips").glob("*.wav"))
    assert len(clips) == 2
    assert cli.run(["verify", *map(str, clips), "--trust", str(studio.authority)]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "clip.opus"], "--output: is 'clip.opus', which can't hold a signed manifest"),
        (["-o", "clip.wav", "--sign-key", ""], "--sign-cert, --sign-key: need each other"),
    ],
)
def test_what_can_not_be_signed_is_refused_before_anything_is_made(
    studio: Identity, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    signing = ["--sign-cert", str(studio.chain)]
    if "--sign-key" in arguments:
        arguments = arguments[:2]
    else:
        signing += ["--sign-key", str(studio.key)]
    assert cli.run(["generate", "a dog barks", *arguments, *signing]) == 2
    assert says in capsys.readouterr().err


def test_clips_without_a_manifest_do_not_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(encode_audio(SOUND_N, 16_000))
    assert cli.run(["verify", str(path), str(tmp_path / "absent.wav")]) == 2
    err = capsys.readouterr().err
    assert "has no manifest" in err
    assert "can't be read" in err


# HTTP


def test_the_web_door_signs_every_clip_and_verifies(generating: Serving, studio: Identity) -> None:
    settings = {"sign_cert": studio.chain, "sign_key": studio.key, "trusted_signers": studio.authority}
    with hosting_web(generation=generating.target, **settings) as url, calling(url) as http:
        assert http.get("/v1/provenance").json()["signer"] == "Example Studio"
        body = {"input": "a dog barks", "seed": 7, "num_inference_steps": 1, "response_format": "mp3"}
        made = http.post("/v1/audio/generate", json=body)
        assert soundfile.info(io.BytesIO(made.content)).format == "MP3"
        manifest = http.post("/v1/provenance", content=made.content).json()["manifest"]
        assert (manifest["state"], manifest["generation"]["seed"]) == ("trusted", "7")
        events = http.post("/v1/audio/generate", json={**body, "stream_format": "sse"}).text
        names = [line.removeprefix("event: ") for line in events.splitlines() if line.startswith("event: ")]
        assert names[-2:] == ["clip", "finished"]
        refused = http.post("/v1/audio/generate", json={**body, "response_format": "opus"})
        assert refused.status_code == 400
        assert "can't hold a signed manifest" in faults(refused)["response_format"]
        assert "is empty" in faults(http.post("/v1/provenance"))["body"]


def test_without_a_certificate_nothing_is_signed(generating: Serving) -> None:
    with hosting_web(generation=generating.target) as url, calling(url) as http:
        assert http.get("/v1/provenance").json() == {"signs": False}
        made = http.post("/v1/audio/generate", json={"input": "a dog barks", "num_inference_steps": 1})
        assert http.post("/v1/provenance", content=made.content).json() == {"manifest": None}
