"""The embedded model family: weights small enough to ship. README.md in this folder is its model card."""

from pathlib import Path

from services.errors import ModelNotFoundError

PARTS = ("mini", "mini-base", "clap-a", "clap-b", "reward", "tagger", "captioner", "audiogen")
"""`mini`: the default text-to-audio model. `mini-base`: pretrained with deliberately wrong captions, the
start of alignment. `clap-a`, `clap-b`: CLAP scorers. `reward`: a reward model that uses `clap-a`. `tagger`:
the independent judge of evaluations. `captioner`: describes clips, the judge of the round trip. `audiogen`: a
language model of audio tokens."""


def mini_folder(name: str) -> Path:
    """Return the folder of a member of the family. Raises `ModelNotFoundError` for an unknown name."""
    if name not in PARTS:
        raise ModelNotFoundError(f"the mini family has no member {name!r}; it has {', '.join(PARTS)}")
    return Path(__file__).parent / name
