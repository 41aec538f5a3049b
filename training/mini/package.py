"""Put the trained parts together as the folders that ship, or take these apart again.

    python -m training.mini.package --work build/mini --target services/models/mini
    python -m training.mini.package --only clap-a --only clap-b --only reward

To continue from the shipped parts in a fresh clone, in float32 and without the optimiser's state:

    python -m training.mini.package --restore --work build/mini
    python -m training.mini.latents
    python -m training.mini.denoiser --name mini --init build/mini/mini/final --steps 4000
    python -m training.mini.package
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import MusicgenForCausalLM, PreTrainedTokenizerFast, T5EncoderModel

from services.api.reading import EVENTS
from services.errors import InvalidInputError, invalid
from services.models.audiogen.codec import QuantisedAutoencoder
from services.models.audiogen.language_model import TextProjection
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.audiogen.sampling import TokenScheduler
from services.models.captioner.model import Captioner
from services.models.clap.loading import load_clap
from services.models.manifest import write_manifest
from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from services.models.reward.model import WEIGHTS_NAME, RewardHead, read_reward_config, save_head
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from services.models.tango.schedulers import SD21_CONFIG
from services.models.vocoder import GriffinLimVocoder
from training.mini.text_encoder import TEXT_LENGTH

DENOISERS = ("mini", "mini-base")
VERSIONS: Final[Mapping[str, str]] = {"mini": "3"}
"""Versions of the parts; of others 2."""
LICENSE = "Apache-2.0"
PROFILES: Final[Mapping[str, dict[str, Any]]] = {
    "mini": {
        "quality": {"num_inference_steps": 10, "guidance_scale": 3.0, "scheduler": "dpmsolver++"},
        "balanced": {"num_inference_steps": 8, "guidance_scale": 3.0, "scheduler": "ddim"},
        "draft": {"num_inference_steps": 5, "guidance_scale": 3.0, "scheduler": "ddim"},
    }
}
"""Profiles by denoiser, chosen by `benchmarks/quality_cost.py`; `balanced` is the default."""
SETTINGS: Final[Mapping[str, Any]] = {
    "num_inference_steps": 25,
    "guidance_scale": 3.0,
    "scheduler": "dpmsolver++",
}
"""The default of denoisers without profiles."""


def assemble(work: Path, denoiser: Path) -> TangoPipeline:
    """Return the pipeline of the parts trained under `work` and the denoiser in the folder `denoiser`."""
    profiles = PROFILES.get(denoiser.parent.name)
    usual = SETTINGS if profiles is None else profiles["balanced"]
    return TangoPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(work / "text_encoder" / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(work / "text_encoder" / "final"),
        unet=UNet2DConditionModel.from_pretrained(denoiser),
        vae=AutoencoderKL.from_pretrained(work / "autoencoder" / "final"),
        vocoder=GriffinLimVocoder(),
        scheduler=DDPMScheduler(**SD21_CONFIG),
        default_duration=2.56,
        max_duration=5.12,
        default_num_inference_steps=usual["num_inference_steps"],
        default_guidance_scale=usual["guidance_scale"],
        default_scheduler=usual["scheduler"],
        text_length=TEXT_LENGTH,
        profiles=profiles,
    )


def assemble_audiogen(work: Path, model: Path) -> AudioGenPipeline:
    """Return the pipeline of the parts trained under `work` and the language model in the folder `model`."""
    decoder = MusicgenForCausalLM.from_pretrained(model / "decoder")
    return AudioGenPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(work / "text_encoder" / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(work / "text_encoder" / "final"),
        projection=TextProjection.from_pretrained(model / "projection"),
        decoder=decoder,
        codec=QuantisedAutoencoder.from_pretrained(work / "codec" / "final"),
        scheduler=TokenScheduler(special=decoder.config.vocab_size),
        default_duration=2.56,
        max_duration=2.56,
        text_length=TEXT_LENGTH,
    )


def _replace(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        # The libraries write weights that only their owner may read; a service runs as another user.
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        shutil.rmtree(target)
    source.replace(target)


def package_pipeline(work: Path, name: str, target: Path) -> None:
    """Package the text-to-audio model `name` and the parts that models share."""
    make = assemble_audiogen if name == "audiogen" else assemble
    pipeline: Any = make(work, work / name / "final")
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    for path in target.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where the part was trained
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def package_clap(work: Path, name: str, target: Path) -> None:
    """Package a CLAP model, in half precision."""
    model = load_clap(work / name / "final")
    model.clap.half()
    model.save(target)


def package_reward(work: Path, name: str, target: Path) -> None:
    """Package the model of `milonga train reward --recipe mini`, in half precision."""
    config = read_reward_config(work / name)
    head = RewardHead(config)
    head.load_state_dict(load_file(work / name / WEIGHTS_NAME))
    save_head(head.half(), config, target)


def package_tagger(work: Path, name: str, target: Path) -> None:
    """Package the tagger, in half precision."""
    EventTagger.from_pretrained(work / name / "final").half().save_pretrained(target)


def package_captioner(work: Path, name: str, target: Path) -> None:
    """Package the captioner, in half precision, with the list of its events."""
    folder = work / name / "model" / "final"
    Captioner.from_pretrained(folder).save_pretrained(target, dtype="float16")
    shutil.copyfile(folder / EVENTS, target / EVENTS)


PACKAGERS: dict[str, Callable[[Path, str, Path], None]] = {
    "mini": package_pipeline,
    "mini-base": package_pipeline,
    "clap-a": package_clap,
    "clap-b": package_clap,
    "reward": package_reward,
    "tagger": package_tagger,
    "captioner": package_captioner,
    "audiogen": package_pipeline,
}


def restore(work: Path) -> None:
    """Write each shipped part to where its program would have left it under `work`.

    Raises `InvalidInputError` if `work` holds a training.
    """
    taken = [name for name in (*DENOISERS, "autoencoder", "text_encoder") if (work / name).exists()]
    if taken:
        fault = f"{work} holds {', '.join(taken)} already; name another folder"
        raise invalid("--work", fault)
    for name in DENOISERS:
        pipeline = load_tango(mini_folder(name), dtype="float32")
        pipeline.unet.save_pretrained(work / name / "final")
    pipeline.vae.save_pretrained(work / "autoencoder" / "final")
    pipeline.text_encoder.save_pretrained(work / "text_encoder" / "final")
    pipeline.tokenizer.save_pretrained(work / "text_encoder" / "tokenizer")
    EventTagger.from_pretrained(mini_folder("tagger")).float().save_pretrained(work / "tagger" / "final")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--target", type=Path, default=Path("services/models/mini"))
    parser.add_argument("--only", action="append", choices=PACKAGERS, help="default: all")
    parser.add_argument("--restore", action="store_true", help="write the shipped parts into --work")
    arguments = parser.parse_args()
    if arguments.restore:
        try:
            restore(arguments.work)
        except InvalidInputError as error:
            parser.error(str(error))
        print(f"{arguments.work}: the shipped parts, in float32")
        return
    arguments.target.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or PACKAGERS:
        temporary = arguments.target / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        PACKAGERS[name](arguments.work, name, temporary)
        write_manifest(temporary, name=name, version=VERSIONS.get(name, "2"), license=LICENSE)
        _replace(temporary, arguments.target / name)
    megabytes = sum(p.stat().st_size for p in arguments.target.rglob("*") if p.is_file()) / 1e6
    print(f"{arguments.target}: {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
