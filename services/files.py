"""Write files whole or not at all, and run work on threads."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import TypeVar

from services.errors import OutputError

Item = TypeVar("Item")
Result = TypeVar("Result")


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
