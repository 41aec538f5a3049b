"""What `load_tango` and `load_generator` load, and what they refuse in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.errors import InvalidInputError, ModelFormatError, ModelNotFoundError
from services.models.architectures import ARCHITECTURES, load_generator
from services.models.latent import clip_generator
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from tests.tiny import tiny_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_loads_what_was_saved(pipeline: TangoPipeline, saved: Path) -> None:
    both = (pipeline, load_tango(saved))
    first, second = (p("a dog barks", generator=clip_generator(0)).audios for p in both)
    assert np.array_equal(first, second)


def test_half_precision_leaves_the_decoder_in_float32(pipeline: TangoPipeline, saved: Path) -> None:
    half = load_tango(saved, dtype="bfloat16")
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    first, second = (p("a dog barks", generator=clip_generator(0)).audios for p in (pipeline, half))
    assert first.shape == second.shape and np.isfinite(second).all()
    assert load_tango(saved, decoder_dtype="bfloat16").vae.dtype == torch.bfloat16


def test_weights_stored_in_half_precision_come_back_in_float32(tmp_path: Path) -> None:
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "half")
    loaded = load_tango(tmp_path / "half")
    assert loaded.unet.dtype == loaded.vae.dtype == torch.float32
    assert np.isfinite(loaded("a dog barks", generator=clip_generator(0)).audios).all()


def _edit(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**data, **changes}))

    return change


def _truncate(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-100])


def _pickle_only(folder: Path) -> None:
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(weights, folder / "unet" / "diffusion_pytorch_model.bin")


def _change_keys(folder: Path) -> None:
    weights = load_file(folder / UNET)
    weights["extra"] = weights.pop("conv_in.bias")
    weights["conv_out.bias"] = torch.zeros(7)
    save_file(weights, folder / UNET)


def _not_an_object(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json; give a folder"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json can't be read"),
        (_edit("model_index.json", _class_name="StableDiffusionPipeline"), "holds a StableDiffusionPipeline"),
        (_edit("model_index.json", unet=["os", "system"]), "unet is a os.system, which is not supported"),
        (_edit("model_index.json", unet=None), "unet is None"),
        (_edit("model_index.json", scheduler=["os", "system"]), "scheduler is a os.system"),
        (_edit("model_index.json", tokenizer=["transformers", "Trainer"]), "is a transformers.Trainer"),
        (_edit("unet/config.json", block_out_channels=[3]), "config.json is not valid"),
        (_edit("unet/config.json", cross_attention_dim=8), "wrong shapes"),
        (_edit("text_encoder/config.json", d_model="wide"), "config.json is not valid"),
        (_truncate, "truncated or not safetensors"),
        (_pickle_only, "only a pickle payload (diffusion_pytorch_model.bin)"),
        (lambda folder: (folder / UNET).unlink(), "holds no weights"),
        (_change_keys, "1 missing keys: conv_in.bias; 1 unknown keys: extra; 1 wrong shapes: conv_out"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer_config.json is missing"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), "can't be loaded"),
        (_not_an_object, "scheduler_config.json is not a JSON object"),
        (lambda folder: shutil.rmtree(folder / "vae"), "config.json is missing"),
    ],
)
def test_damaged_folder_is_refused(
    saved: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ModelFormatError) as caught:
        load_tango(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ModelFormatError) as caught:
        load_generator(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_registry_knows_each_family_by_the_name_of_its_class() -> None:
    assert all(name == family.pipeline.__name__ for name, family in ARCHITECTURES.items())


def test_a_generator_is_loaded_by_its_family(pipeline: TangoPipeline, saved: Path) -> None:
    loaded = load_generator(saved, dtype="bfloat16")
    assert isinstance(loaded, TangoPipeline) and loaded.unet.dtype == torch.bfloat16
    assert loaded.description == pipeline.description
    assert ARCHITECTURES["TangoPipeline"].default_duration(saved) == 0.64


def test_what_encodes_is_loaded_without_the_denoiser(pipeline: TangoPipeline, saved: Path) -> None:
    family = ARCHITECTURES["TangoPipeline"]
    encoders = family.load_encoders(saved, torch.device("cpu"))
    assert isinstance(encoders, TangoPipeline) and encoders.unet is None
    waveform_BN = torch.randn(1, pipeline.latent_samples(0.64), generator=clip_generator(0)) / 10
    assert torch.equal(encoders.encode_audio(waveform_BN), pipeline.encode_audio(waveform_BN))
    ours, theirs = (one.encode(["a dog"], length=16) for one in (encoders, pipeline))
    assert torch.equal(ours["embeds"], theirs["embeds"])


def test_released_checkpoint_is_told_apart(released: Path) -> None:
    with pytest.raises(ModelFormatError, match="run `milonga convert`"):
        load_tango(released)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a folder"):
        load_tango(tmp_path / "nowhere")


def test_wrong_device_and_type(saved: Path) -> None:
    with pytest.raises(InvalidInputError, match="device: 'toaster' can't be used"):
        load_tango(saved, device="toaster")
    with pytest.raises(InvalidInputError, match="dtype: unknown type 'int8'"):
        load_tango(saved, dtype="int8")
