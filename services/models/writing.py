"""Write model folders whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from services.errors import OutputError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`; rename it to `target` on success, remove it on failure.

    Raises:
        OutputError: `target` exists already or can't be written.
    """
    if target.exists():
        raise OutputError(f"{target} exists already; remove it or choose another folder")
    with replaced_folder(target) as temporary:
        yield temporary


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`, which replaces it on success; remove it on failure.

    Raises:
        OutputError: `target` can't be written; what was there before is unchanged.
    """
    temporary, old = (target.with_name(f".{target.name}.{what}") for what in ("part", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        # safetensors' 0600 would make the model unreadable for a service's user.
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            old.rename(target)
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{target} can't be written: {reason}; make room, or write elsewhere") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
