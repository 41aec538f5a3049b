"""C2PA manifests in clips: who made a clip, and whether it was changed since. Needs the extra `provenance`.

`signing.ClipSigner` writes them, `reading.read_provenance` reads and verifies them.
"""

from importlib.util import find_spec
from typing import Final

from services.errors import UnsupportedError, invalid

SIGNABLE: Final = ("wav", "flac", "mp3")
"""Encodings that hold a manifest."""
GENERATION_LABEL: Final = "dev.milonga.generation"
"""Label of the assertion with what made a clip."""


def require_library() -> None:
    """Raise `UnsupportedError` if the library is not installed."""
    if find_spec("c2pa") is None:
        raise UnsupportedError("c2pa-python is not installed; pip install 'milonga[provenance]'")


def check_signable(field: str, value: str, encoding: str) -> None:
    """Raise `InvalidInputError` for an encoding that holds no manifest; `field` and `value` name it."""
    if encoding not in SIGNABLE:
        known = ", ".join(SIGNABLE)
        raise invalid(field, f"is {value[:40]!r}, which can't hold a signed manifest, must be one of {known}")
