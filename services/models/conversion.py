"""What the converters of released checkpoints share: types, and the folders that they read."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from services.errors import ModelNotFoundError

Weights = Mapping[str, Tensor]
"""A state dictionary, or a part of one."""

Progress = Callable[[str], None]
"""Called with the name of each stage."""


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
