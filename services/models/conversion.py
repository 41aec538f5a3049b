"""What the converters of released checkpoints share: folders they read from and write to."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from services.errors import ModelNotFoundError, OutputError


def folder_or_hub(part: str, text: str, example: str, patterns: Sequence[str]) -> Path:
    """Return the folder that ``DIR`` or ``hf:OWNER/NAME`` names; the hub's is downloaded.

    Args:
        part: what the folder holds, for errors.
        text: the folder, or ``hf:`` and a repository of the Hugging Face hub.
        example: a repository that has the part, for errors.
        patterns: files to download.

    Raises:
        ModelNotFoundError: there is no such folder, or the repository can't be fetched.
    """
    if not text.startswith("hf:"):
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ModelNotFoundError(f"{part}: {folder} is not a folder; give one, or hf:{example}")
        return folder
    from huggingface_hub import snapshot_download  # imported only for the hub

    try:
        return Path(snapshot_download(text.removeprefix("hf:"), allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).strip().partition("\n")[0]
        raise ModelNotFoundError(
            f"{part}: {text} can't be fetched ({reason}); set HF_HUB_OFFLINE=0 if it is 1, "
            "or download it and give its folder"
        ) from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`; rename it to `target` on success, remove it on failure.

    Raises:
        OutputError: `target` exists already or can't be written.
    """
    if target.exists():
        raise OutputError(f"{target} exists already; remove it or choose another folder")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield temporary
        # mkdtemp's 0700 and safetensors' 0600 would make the model unreadable for a service's user.
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(temporary, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target} can't be written: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
