"""The embedded model family: weights small enough to ship. README.md beside this file is its model card."""

from pathlib import Path

from services.errors import ModelNotFoundError

PARTS = ("mini", "mini-base", "clap-a", "clap-b", "reward", "tagger")
"""`mini`: the default text-to-audio model. `mini-base`: taught with captions wrong on purpose, the pupil
of alignment. `clap-a`, `clap-b`: the scorers. `reward`: a reward model that stands on `clap-a`.
`tagger`: the judge."""


def mini_folder(name: str) -> Path:
    """The folder of one member of the family. Raises `ModelNotFoundError` for an unknown name."""
    if name not in PARTS:
        raise ModelNotFoundError(f"the mini family has no member {name!r}; it has {', '.join(PARTS)}")
    return Path(__file__).parent / name
