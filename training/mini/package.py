"""Put the trained parts together as the folders that ship: `mini`, `mini-base` and the tagger.

python -m training.mini.package --work build/mini --target services/models/mini
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from services.models.manifest import write_manifest
from services.models.schedulers import SD21_CONFIG
from services.models.tagger import EventTagger
from services.models.tango import TangoPipeline
from services.models.vocoder import GriffinLimVocoder
from training.mini.text_encoder import TEXT_LENGTH

DENOISERS = ("mini", "mini-base")
VERSION = "1"
LICENSE = "Apache-2.0"


def assemble(work: Path, denoiser: Path) -> TangoPipeline:
    """The pipeline of the parts trained under `work` and the denoiser in the folder `denoiser`."""
    return TangoPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(work / "text_encoder" / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(work / "text_encoder" / "final"),
        unet=UNet2DConditionModel.from_pretrained(denoiser),
        vae=AutoencoderKL.from_pretrained(work / "autoencoder" / "final"),
        vocoder=GriffinLimVocoder(),
        scheduler=DDPMScheduler(**SD21_CONFIG),
        default_duration=2.56,
        max_duration=5.12,
        default_num_inference_steps=25,
        default_guidance_scale=3.0,
        default_scheduler="dpmsolver++",
        text_length=TEXT_LENGTH,
    )


def _replace(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        # The libraries write weights that only their owner may read; a service runs as somebody else.
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        shutil.rmtree(target)
    source.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--target", type=Path, default=Path("services/models/mini"))
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    for name in DENOISERS:
        temporary = arguments.target / f".{name}.tmp"
        assemble(arguments.work, arguments.work / name / "final").to(torch.float16).save_pretrained(
            temporary, safe_serialization=True
        )
        write_manifest(temporary, name=name, version=VERSION, license=LICENSE)
        _replace(temporary, arguments.target / name)
    temporary = arguments.target / ".tagger.tmp"
    EventTagger.from_pretrained(arguments.work / "tagger" / "final").half().save_pretrained(temporary)
    write_manifest(temporary, name="tagger", version=VERSION, license=LICENSE)
    _replace(temporary, arguments.target / "tagger")
    megabytes = sum(p.stat().st_size for p in arguments.target.rglob("*") if p.is_file()) / 1e6
    print(f"{arguments.target}: {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
