"""The embedded model family: weights small enough to ship. README.md in this folder is its model card."""

from importlib.util import find_spec
from pathlib import Path

from services.errors import ModelNotFoundError

DISTRIBUTION = "milonga_real"
"""Package that has the family `REAL`, where a release keeps it out of the main one for its size."""
_SPEC = find_spec(DISTRIBUTION)
_PLACES = (Path(__file__).parent, *map(Path, _SPEC.submodule_search_locations or () if _SPEC else ()))
REAL = ("mini-real", "mini-real-base")
"""Generators of recorded sounds, made by `milonga train new`: own weights, which need ready-made parts. A
release has those whose folders are here, or in `DISTRIBUTION` (`training.mini.real`)."""
GENERATORS = (
    "mini",
    "mini-base",
    *(name for name in REAL if any((place / name).is_dir() for place in _PLACES)),
)
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
    return next((place / name for place in _PLACES if (place / name).is_dir()), _PLACES[0] / name)
