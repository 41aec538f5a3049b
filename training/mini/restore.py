"""Take the shipped parts apart again, so that a training can go on from them in a fresh clone.

    python -m training.mini.restore --work build/mini
    python -m training.mini.latents
    python -m training.mini.denoiser --name mini --init build/mini/mini/final --steps 4000
    python -m training.mini.package

The optimiser's state is not shipped: what goes on is a new run from old weights, in float32.
"""

import argparse
from pathlib import Path

from services.models.mini import mini_folder
from services.models.mini.tagger import EventTagger
from services.models.tango.loading import load_tango
from training.mini.package import DENOISERS


def restore(work: Path) -> None:
    """Write each part to where its program would have left it under `work`."""
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
    arguments = parser.parse_args()
    taken = [name for name in (*DENOISERS, "autoencoder", "text_encoder") if (arguments.work / name).exists()]
    if taken:
        parser.error(f"{arguments.work} holds {', '.join(taken)} already; name another folder with --work")
    restore(arguments.work)
    print(f"{arguments.work}: the shipped parts, in float32")


if __name__ == "__main__":
    main()
