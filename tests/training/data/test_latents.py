from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from services.errors import OutputError
from services.models.mel import LogMel, mel_frames
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from tests.training.finetuning.finetune_program import LOOP, PROMPTS, clip, write_model
from training.data import latents as latents_module
from training.data.examples import Clip, FileClip
from training.data.latents import Encoder, LatentConfig, Latents, TensorCache
from training.loop.fit import make_accelerator

EXACT = LatentConfig(dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> TangoPipeline:
    return load_tango(folder)


def _latents(cache: Path, folder: Path, config: LatentConfig = EXACT) -> Latents:
    return Latents(cache, folder, config, make_accelerator(LOOP))


def _clips(folder: Path, *contents: bytes) -> list[Clip]:
    paths = [folder / f"{number}.wav" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [FileClip(path=path) for path in paths]


def test_latents_are_the_mean_of_the_autoencoder_times_its_scale(
    tmp_path: Path, folder: Path, pipeline: TangoPipeline
) -> None:
    clips = _clips(tmp_path, clip(0), clip(1))
    made = _latents(tmp_path, folder)
    assert made.add(clips, PROMPTS) == {}
    waveforms = torch.from_numpy(np.concatenate([c.read()[0] for c in clips]))
    mean = pipeline.vae.encode(mel_frames(waveforms, LogMel())).latent_dist.mean
    latents = made.clips(clips)
    assert latents.shape == (2, *pipeline.geometry.latent_shape(0.64))
    torch.testing.assert_close(latents, 0.9 * mean.detach(), rtol=1e-5, atol=1e-5)


def test_short_clips_are_padded_and_long_ones_cut(tmp_path: Path, folder: Path) -> None:
    half, whole, long = _clips(tmp_path, clip(0, 0.32), clip(0, 0.64), clip(0, 1.0))
    padded = tmp_path / "padded.wav"
    soundfile.write(padded, np.concatenate([half.read()[0][0], np.zeros(5_120)]), 16_000, subtype="PCM_16")
    made = _latents(tmp_path, folder)
    clips = [half, FileClip(path=padded), whole, long]
    made.add(clips, [])
    a, b, c, d = made.clips(clips)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(d, c, rtol=1e-3, atol=2e-2)  # except for the window at the edge
    other = _latents(tmp_path, folder, replace(EXACT, duration=1.28))
    other.add(clips, [])
    assert other.clips([whole]).shape[2] == 2 * c.shape[1]


def test_clips_of_another_rate_and_in_stereo_are_the_same_sound(tmp_path: Path, folder: Path) -> None:
    encoder = Encoder(folder, EXACT, torch.device("cpu"))
    mono, stereo = (
        (0.3 * np.sin(2 * np.pi * 440 * np.arange(round(0.64 * rate)) / rate)).astype(np.float32)
        for rate in (16_000, 44_100)
    )
    ours, theirs = encoder.latents([(mono, 16_000), (np.stack([stereo, stereo]), 44_100)])
    assert (ours - theirs).abs().mean() < 0.02 * ours.abs().mean()


def test_normalised_clips_are_as_loud_as_upstreams(tmp_path: Path, folder: Path) -> None:
    encoder = Encoder(folder, replace(EXACT, normalise=True), torch.device("cpu"))
    quiet = np.random.default_rng(0).normal(0.2, 0.01, 10_240).astype(np.float32)
    torch.testing.assert_close(
        encoder.latents([(quiet, 16_000)]), encoder.latents([(7 * quiet - 1, 16_000)]), rtol=1e-3, atol=1e-3
    )


def test_a_clip_read_as_upstream_reads_it(folder: Path) -> None:
    """The first channel, without its mean, at a peak of 1/2 after the cut too: upstream's `read_wav_file`."""
    rng = np.random.default_rng(0)
    stereo = rng.normal(0.05, 0.02, (2, 16_000)).astype(np.float32)
    stereo[:, 12_000] = 0.9  # the loudest sample is cut off
    config = replace(EXACT, normalise=True, normalise_cut=True, channel="first")
    encoder = Encoder(folder, config, torch.device("cpu"))
    row = np.zeros(10_240, dtype=np.float32)
    encoder._write_row(stereo, 16_000, row)
    expected = stereo[0] - stereo[0].mean()
    expected = (expected / np.abs(expected).max() * 0.5)[:10_240]
    np.testing.assert_allclose(row, expected / np.abs(expected).max() * 0.5, rtol=1e-4, atol=1e-6)
    plain = np.zeros_like(row)
    Encoder(folder, replace(EXACT, normalise=True), torch.device("cpu"))._write_row(stereo, 16_000, plain)
    assert np.abs(plain).max() < 0.1  # ours keeps how loud the beginning is
    silence = np.zeros_like(row)
    encoder._write_row(np.zeros((2, 16_000), dtype=np.float32), 16_000, silence)
    assert not silence.any()


def test_each_step_may_sample_the_posterior(tmp_path: Path, folder: Path) -> None:
    clips = _clips(tmp_path, clip(0), clip(1))
    config = replace(EXACT, encode_online=True, posterior="sample")
    made = _latents(tmp_path, folder, config)
    made.add(clips, PROMPTS)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return made.clips(clips)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    mean = _latents(tmp_path, folder, replace(EXACT, encode_online=True))
    mean.add(clips, PROMPTS)
    drawn = torch.stack([draw(seed) for seed in range(200)])
    deviation = drawn.std(0)
    assert ((drawn.mean(0) - mean.clips(clips)).abs() < 5 * deviation / 200**0.5 + 1e-5).all()
    with pytest.raises(ValueError, match="posterior is sample, which needs encode_online"):
        replace(EXACT, posterior="sample")


def test_latents_do_not_depend_on_the_rest_of_the_batch(tmp_path: Path, folder: Path) -> None:
    clips = _clips(tmp_path, *(clip(seed) for seed in range(20)))
    together, alone = _latents(tmp_path / "a", folder), _latents(tmp_path / "b", folder)
    together.add(clips, PROMPTS)
    alone.add(clips[17:18], PROMPTS[2:3])
    assert torch.equal(together.clips(clips[17:18]), alone.clips(clips[17:18]))
    ours, theirs = together.text(PROMPTS[2:3]), alone.text(PROMPTS[2:3])
    length = theirs.length
    assert torch.equal(ours["embeds"][:, :length], theirs["embeds"]) and not ours["mask"][:, length:].any()


def test_clips_with_cached_content_are_not_encoded_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = _clips(tmp_path, clip(0), clip(1))
    first = _latents(tmp_path, folder)
    first.add(clips, PROMPTS)
    copy = tmp_path / "copy.wav"
    copy.write_bytes(clip(1))

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(latents_module, "Encoder", refuse)
    again = _latents(tmp_path, folder)
    again.add([FileClip(path=copy)], PROMPTS[:1])
    assert torch.equal(again.clips([FileClip(path=copy)]), first.clips(clips[1:]))
    with pytest.raises(AssertionError, match="encoded again"):
        _latents(tmp_path, folder, LatentConfig(dtype="float16")).add(clips, [])


def test_an_interrupted_encoding_resumes_after_the_last_complete_file(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "SHARD", 2)
    clips = _clips(tmp_path, *(clip(seed) for seed in range(5)))
    inner, calls = Encoder.latents, []

    def count(self: Encoder, read: Any) -> Any:
        calls.append(len(read))
        if sum(calls) > 4:
            raise KeyboardInterrupt
        return inner(self, read)

    monkeypatch.setattr(Encoder, "latents", count)
    with pytest.raises(KeyboardInterrupt):
        _latents(tmp_path, folder).add(clips, [])
    calls.clear()
    made = _latents(tmp_path, folder)
    made.add(clips, [])
    assert calls == [1]
    whole = made.clips(clips).clone()
    assert len(whole) == 5
    (damaged, *_) = sorted(tmp_path.glob("latents-*/*.safetensors"))
    damaged.unlink()  # not overwritten: it is mapped into memory
    damaged.write_bytes(b"half")
    calls.clear()
    again = _latents(tmp_path, folder)
    again.add(clips, [])
    assert sum(calls) in (1, 2)
    assert torch.equal(again.clips(clips), whole)


def test_unreadable_clips_are_returned_with_their_copies(tmp_path: Path, folder: Path) -> None:
    clips = _clips(tmp_path, clip(0), b"no sound", b"no sound")
    clips.append(FileClip(path=tmp_path / "missing.wav"))
    unreadable = _latents(tmp_path, folder).add(clips, [])
    assert list(unreadable) == clips[1:]
    assert unreadable[clips[3]] == "No such file or directory"
    assert unreadable[clips[1]] == unreadable[clips[2]]


def test_conditioning_is_that_of_the_pipeline(tmp_path: Path, folder: Path, pipeline: TangoPipeline) -> None:
    made = _latents(tmp_path, folder)
    made.add([], PROMPTS)
    text = made.text([*PROMPTS, ""])
    expected = pipeline.encode([*PROMPTS, ""])
    length = int(expected["mask"].sum(1).max())
    assert text.length == length
    assert torch.equal(text["mask"], expected["mask"][:, :length])
    embeds = expected["embeds"][:, :length] * text["mask"][..., None]
    torch.testing.assert_close(text["embeds"], embeds, rtol=1e-5, atol=1e-6)


def test_online_encoding_gives_the_same(tmp_path: Path, folder: Path) -> None:
    clips = _clips(tmp_path, clip(0), clip(1))
    cached = _latents(tmp_path, folder, LatentConfig())
    online = _latents(tmp_path, folder, LatentConfig(encode_online=True))
    for one in (cached, online):
        one.add(clips, PROMPTS)
    assert torch.equal(cached.clips(clips), online.clips(clips))
    text = cached.text(PROMPTS)
    torch.testing.assert_close(online.text(PROMPTS)["embeds"][:, : text.length], text["embeds"])


def test_a_full_disk_gives_a_one_line_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latents_module, "save_file", full)
    cache = TensorCache(tmp_path / "cache")
    with pytest.raises(OutputError, match="No space left on device; make room"):
        cache.save({"a": torch.zeros(1)})
    assert not list((tmp_path / "cache").iterdir())
