"""Bearer tokens: made, read from a file, and hashed. Imports nothing of the serving extra."""

import hashlib
import secrets
from pathlib import Path
from typing import Final

from services.errors import invalid

PREFIX: Final = "milonga_"
"""Prefix of new tokens, by which secret scanners recognise them."""


def new_token() -> str:
    """Return a token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def token_digest(token: str) -> str:
    """Return ``sha256:HEX``. Tokens are long and random, so that a slow hash would protect nothing more."""
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def read_token(field: str, path: Path) -> str:
    """Return the token in a file.

    Raises:
        InvalidInputError: the file can't be read, or holds no token; names `field`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise invalid(field, f"is {path}, which can't be read: {reason}") from error
    return check_token(field, text)


def check_token(field: str, text: str) -> str:
    """Return the token in a text. Raises `InvalidInputError`, without the text, if it holds none."""
    text = text.strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise invalid(field, "holds no token: give one line of printable ASCII without spaces")
    return text
