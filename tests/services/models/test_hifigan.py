"""HiFi-GAN checkpoints: the weights of transformers' class, and what is refused."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from services.errors import DigestMismatchError, ModelFormatError, ModelNotFoundError
from services.models.hifigan import (
    PACKAGE_DIGEST,
    VocoderMel,
    find_hifigan,
    load_hifigan,
    merge_weight_norm,
)
from tests.services.models.hifigan_release import SETTINGS, write_release


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A checkpoint in the format of a release."""
    return write_release(tmp_path)


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 5), nn.ConvTranspose1d(3, 4, 5)])
def test_merged_weights_are_those_that_torch_computes(layer: nn.Module) -> None:
    normalised = weight_norm(layer)
    with torch.no_grad():
        normalised.parametrizations.weight.original0.mul_(1.7)
    given = {
        "layer.weight_g": normalised.parametrizations.weight.original0,
        "layer.weight_v": normalised.parametrizations.weight.original1,
        "layer.bias": normalised.bias,
    }
    merged = merge_weight_norm(given)
    assert merged.keys() == {"layer.weight", "layer.bias"}
    torch.testing.assert_close(merged["layer.weight"], normalised.weight)


def test_a_release_becomes_a_vocoder_and_its_spectrogram(release: Path) -> None:
    vocoder, mel = load_hifigan(release)
    assert mel == VocoderMel(sampling_rate=8_000, hop_length=8, mel_bins=5, maximum_hertz=3_000.0)
    waveform_BN = vocoder(torch.randn(2, 10, 5))
    assert waveform_BN.shape == (2, 10 * 8)
    assert waveform_BN.std() > 0


def test_an_upper_edge_that_is_not_stated_is_half_the_rate(release: Path) -> None:
    release.with_name("config.json").write_text(json.dumps({**SETTINGS, "fmax": None}))
    assert load_hifigan(release)[1].maximum_hertz == 4_000.0


def _without(name: str) -> Callable[[Path], object]:
    rest = {key: value for key, value in SETTINGS.items() if key != name}
    return lambda path: path.with_name("config.json").write_text(json.dumps(rest))


def _with(**changes: object) -> Callable[[Path], object]:
    return lambda path: path.with_name("config.json").write_text(json.dumps({**SETTINGS, **changes}))


def _content(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_without("hop_size"), "missing settings: hop_size"),
        (_with(n_fft=2048), "n_fft is 2048, not 1024"),
        (_with(fmin=20), "fmin is 20, not 0"),
        (_with(upsample_rates=[4, 4, 2]), "hop_size is 8, not 32"),
        (lambda path: path.with_name("config.json").unlink(), "config.json is missing"),
        (_content({"weights": {}}), "no tensors under `generator`"),
        (_content({"generator": {"conv_pre.weight": torch.ones(2)}}), "not HiFi-GAN weights"),
        (lambda path: path.write_bytes(b""), "is an empty file"),
    ],
)
def test_what_is_no_release_is_refused(
    break_it: Callable[[Path], object], message: str, release: Path
) -> None:
    break_it(release)
    with pytest.raises(ModelFormatError, match=message):
        load_hifigan(release)


def test_another_file_than_the_named_one_is_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatchError, match="not 00"):
        load_hifigan(release, "00")
    with pytest.raises(ModelNotFoundError, match="is not a file"):
        load_hifigan(tmp_path / "other.pth")


def test_the_universal_generator_equals_the_package() -> None:
    try:
        path = find_hifigan()
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    vocoder, mel = load_hifigan(path, PACKAGE_DIGEST)
    assert mel == VocoderMel(sampling_rate=22_050, hop_length=256, mel_bins=80, maximum_hertz=8_000.0)

    # Not by its package, which imports torchaudio and librosa.
    spec = importlib.util.spec_from_file_location("hifigan_models", path.parents[1] / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Settings(dict[str, Any]):
        __getattr__ = dict.__getitem__

    with pytest.warns(FutureWarning, match="weight_norm"):
        theirs = module.Generator(Settings(json.loads(path.with_name("config.json").read_text())))
    theirs.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["generator"])
    mel_BTM = torch.randn(1, 12, 80) * 2 - 5
    with torch.no_grad():
        expected_BN = theirs.eval()(mel_BTM.transpose(1, 2)).squeeze(1)
        torch.testing.assert_close(vocoder(mel_BTM), expected_BN, atol=5e-6, rtol=0)
