"""The embedded model family: weights small enough to ship. README.md in this folder is its model card."""

from pathlib import Path

from services.errors import ModelNotFoundError

_FOLDER = Path(__file__).parent
REAL = ("mini-real", "mini-real-base")
"""Generators of recorded sounds, made by `milonga train new`: own weights, which need ready-made parts. A
release has those whose folders are here (`training.mini.real`)."""
GENERATORS = ("mini", "mini-base", *(name for name in REAL if (_FOLDER / name).is_dir()))
"""Models that need no prefix in a URI."""
PARTS = (*GENERATORS, "clap-a", "clap-b", "reward", "tagger", "captioner", "audiogen")
"""`mini`: the default text-to-audio model. `mini-base`: pretrained with deliberately wrong captions, the
start of alignment. `clap-a`, `clap-b`: CLAP scorers. `reward`: a reward model that uses `clap-a`. `tagger`:
the independent judge of evaluations. `captioner`: describes clips, the judge of the round trip. `audiogen`: a
language model of audio tokens."""


def mini_folder(name: str) -> Path:
    """Return the folder of a member of the family. Raises `ModelNotFoundError` for an unknown name."""
    if name not in PARTS:
        raise ModelNotFoundError(f"the mini family has no member {name!r}; it has {', '.join(PARTS)}")
    return _FOLDER / name
