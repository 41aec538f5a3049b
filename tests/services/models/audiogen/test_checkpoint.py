"""Released checkpoints: every key and setting, and files that are hostile, damaged or do not fit."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from services.cli import run
from services.errors import ModelFormatError, ModelNotFoundError, OutputError
from services.models.architectures import check_generator
from services.models.audiogen.checkpoint import build_codec, convert_audiogen
from services.models.manifest import verify_manifest
from tests.services.models.audiogen.released import CODEC_SETTINGS, codec_weights
from tests.tiny import tiny_text_encoder

LM, CODEC = "state_dict.bin", "compression_state_dict.bin"


@pytest.fixture
def own(released: Path, tmp_path: Path) -> Path:
    """A copy of the released checkpoint, to damage."""
    return Path(shutil.copytree(released, tmp_path / "released"))


def convert(source: Path, target: Path) -> Path:
    return convert_audiogen(source, target, text_encoder=str(source / "t5"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def setting(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        settings = yaml.safe_load(content["xp.cfg"])
        part = settings
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        content["xp.cfg"] = yaml.safe_dump(settings)

    return change


def test_a_converted_folder_is_complete_and_verified(converted_folder: Path) -> None:
    check_generator(converted_folder)
    verify_manifest(converted_folder)
    assert not list(converted_folder.rglob("*.bin"))


def test_both_spellings_of_weight_norm_are_one(converted_folder: Path) -> None:
    first, second = (
        build_codec(CODEC_SETTINGS, codec_weights(old_names=old)).state_dict() for old in (False, True)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        (CODEC, lambda c: (c.clear(), c.update(pretrained="facebook/encodec_32khz")),
         "holds no weights, but refers to the model 'facebook/encodec_32khz'"),
        (LM, lambda c: c.pop("best_state"), "1 missing keys: best_state"),
        (LM, lambda c: c.update({"xp.cfg": "a: [1"}), "xp.cfg is not YAML"),
        (LM, lambda c: c.update({"xp.cfg": "text"}), "xp.cfg holds no settings"),
        (LM, lambda c: c.update(best_state=[1]), "best_state is no state dictionary"),
        (LM, lambda c: c["best_state"].pop("linears.2.weight"), "1 missing keys: lm_heads.2.weight"),
        (LM, lambda c: c["best_state"].update(extra=torch.zeros(1)), "1 unknown keys: extra"),
        (LM, lambda c: c["best_state"]["out_norm.weight"].fill_(torch.nan), "hold NaN or infinity"),
        (LM, setting("transformer_lm", "norm_first", value=False), "norm_first is False"),
        (LM, setting("transformer_lm", "num_heads", value="x"), "num_heads is 'x'"),
        (LM, setting("codebooks_pattern", "delay", value={"delays": [0, 0, 0, 0]}), "delays [0, 0, 0, 0]"),
        (LM, setting("transformer_lm", value=None), "no section transformer_lm"),
        (CODEC, lambda c: c["best_state"].pop("quantizer.vq.layers.3._codebook.embed"),
         "1 missing keys: quantizer.layers.3.codebook.embed"),
        (CODEC, setting("rvq", "n_q", value=3), "unknown keys: quantizer.layers.3.codebook"),
        (CODEC, setting("channels", value=2), "channels is 2"),
        (CODEC, setting("seanet", "norm", value="time_group_norm"), "norm is 'time_group_norm'"),
    ],
)  # fmt: skip
def test_whatever_is_not_as_expected_is_named(
    own: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    edit(own / file, change)
    with pytest.raises(ModelFormatError) as caught:
        convert(own, tmp_path / "out")
    assert text in str(caught.value) and file in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_no_code_of_a_file_runs(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"xp.cfg": Exploit(), "best_state": {}}, own / LM)
    with pytest.raises(ModelFormatError, match="could run code, and was not loaded"):
        convert(own, tmp_path / "out")
    assert "executed" not in capsys.readouterr().out


def test_parts_must_fit_and_be_there(own: Path, tmp_path: Path) -> None:
    tiny_text_encoder(20, width=16).save_pretrained(own / "wide")
    for path in (own / "t5").glob("tokenizer*"):
        shutil.copy(path, own / "wide")
    with pytest.raises(ModelFormatError, match=r"text encoder"):
        convert_audiogen(own, tmp_path / "out", text_encoder=str(own / "wide"))
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        convert(own, tmp_path / "there")
    (own / CODEC).unlink()
    with pytest.raises(ModelNotFoundError, match=r"has no compression_state_dict\.bin"):
        convert(own, tmp_path / "out")


def test_checkpoints_of_a_training_are_read_too(own: Path, tmp_path: Path) -> None:
    """Before upstream's export, the weights are one level deeper."""
    edit(own / LM, lambda content: content.update(best_state={"model": copy.copy(content["best_state"])}))
    assert convert(own, tmp_path / "out").is_dir()


def test_the_command(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "out")
    arguments = ["convert-audiogen", str(released), target, "--text-encoder", str(released / "t5")]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == target and "language model" in printed.err
    assert run([*arguments, "--quiet"]) == 4
    assert "exists already" in capsys.readouterr().err
