"""Write files whole or not at all, hash them, recognise failed downloads, and run work on threads."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from services.errors import OutputError

Item = TypeVar("Item")
Result = TypeVar("Result")

HEAD: Final = 1024
"""Bytes of a file's beginning that `describe_file` needs."""

_PAGES: Final = (b"<!doctype html", b"<html", b"<head", b"<script", b"<body")
_REPLIES: Final = (
    *(b'{"error', b'{"message"', b'{"detail"', b"<error>", b"<?xml", b"entry not found", b"not found"),
    *(b"access denied", b"access to model", b"access to dataset", b"invalid username", b"unauthorized"),
    *(b"forbidden", b"400", b"401", b"403", b"404", b"429", b"500", b"502", b"503"),
)
"""How error replies of servers begin: of the Hugging Face hub, GitHub, S3 and proxies."""

_ARCHIVES: Final = {
    b"\x1f\x8b": "compressed by gzip; unpack it first (gunzip)",
    b"PK\x03\x04": "a ZIP archive; unpack it first (an Excel workbook: save it as CSV)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it as CSV",
    b"BZh": "compressed by bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ": "compressed by xz; unpack it first (unxz)",
    b"(\xb5/\xfd": "compressed by Zstandard; unpack it first (unzstd)",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
}
"""Files that hold others, by their first bytes."""

_APPLE_DOUBLE: Final = bytes.fromhex("00051607")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name next to it, then rename it into place. Creates its folder.

    If anything fails, no half-written file stays, and an older file is unchanged.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OutputError(f"{path} can't be written: {reason}; make room, or write elsewhere") from error
        raise


def temporary_name(path: Path) -> Path:
    """Return a hidden name next to `path` that nothing else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def describe_file(head: bytes) -> str | None:
    """Return what a file is that lies where a sound or weights belong, with the remedy. Not for text files.

    The answer completes "PATH is …". `head` is the file's first `HEAD` bytes, or all if it has fewer. Returns
    None if they show none of the known kinds.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "an empty file; fetch it again"
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if b"/annex/objects/" in head and len(head) < HEAD:
        return "a git-annex pointer, not the file itself; run `git annex get` on it"
    if text.startswith(_PAGES):
        return (
            "a web page (HTML), not the file itself; download the file, not the page about it (on the "
            "Hugging Face hub the address has /resolve/, not /blob/), and log in if it asks for that"
        )
    if text.startswith(_REPLIES) and len(head) < HEAD:
        reply = " ".join(head.decode(errors="replace").split())[:80]
        return f"a server's reply ({reply}), not the file itself; fetch it again"
    if head.startswith(_APPLE_DOUBLE):
        return (
            "a macOS resource fork (AppleDouble), not the file itself; take the file without ._ in its name"
        )
    if len(head) == HEAD and not any(head):
        return "a file of zero bytes, as an interrupted download leaves it; fetch it again"
    return None


def describe_archive(head: bytes) -> str | None:
    """Return which archive lies where a list or a sound belongs, as `describe_file`. Some weights are ZIP."""
    return next((what for mark, what in _ARCHIVES.items() if head.startswith(mark)), None)


def describe_path(path: Path) -> str | None:
    """Apply `describe_file` to the beginning of the file `path`; return None if it can't be read."""
    try:
        with path.open("rb") as file:
            return describe_file(file.read(HEAD))
    except OSError:
        return None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 in hex of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], count: int, stop: Callable[[], None] | None = None
) -> Iterator[tuple[Item, Result]]:
    """Do `work` on up to `count` items at a time, on threads; yield each item with its result as it is done.

    If one fails, or the caller leaves, no further ones begin, `stop` is called (to end those in progress
    sooner), and those are awaited.
    """
    pending: dict[Future[Result], Item] = {}
    source = iter(items)
    pool = ThreadPoolExecutor(count, thread_name_prefix="side-by-side")
    try:
        while True:
            for item in islice(source, count - len(pending)):
                pending[pool.submit(work, item)] = item
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()
    finally:
        if pending and stop is not None:
            stop()
        pool.shutdown(wait=True, cancel_futures=True)
