"""Report silent clips, pairs of equal clips, and the decoder's warnings about training examples."""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]

from training.data.examples import Clip, FileClip, ParquetClip, decode_clip, shown
from training.loop.progress import progress

SILENT_MEAN_SQUARE = 1e-8
"""Below -80 dB of full scale a clip is silent."""

Content = tuple[str, bool, tuple[str, ...]]
"""Digest of the decoded samples, whether they are silent, and decoding's warnings."""


def report_content(
    pairs: Sequence[tuple[Clip, Clip | None]], accelerator: Accelerator | None = None
) -> dict[str, Any]:
    """Examine clips; return the entries of a training's report on them, and print warnings.

    Procedural clips are taken as they are, and unreadable ones left out.

    Args:
        pairs: a clip to learn from, and the one to learn to avoid, if any.
        accelerator: divides the clips among processes; None: this process examines all of them.
    """
    found = _contents(dict.fromkeys(clip for pair in pairs for clip in pair if clip), accelerator)
    equal = [a.name for a, b in pairs if b and a in found and b in found and found[a][0] == found[b][0]]
    silent = [a.name for a, _ in pairs if a in found and found[a][1]]
    warnings = {clip.name: "; ".join(content[2]) for clip, content in found.items() if content[2]}
    if accelerator is None or accelerator.is_main_process:
        _warn(f"of {len(pairs)} pairs have equal clips, so that nothing is preferred", equal)
        _warn(f"of {len(pairs)} clips to learn from are silent", silent)
        for line in shown([f"{name}: {warning}" for name, warning in warnings.items()]):
            print(f"warning: {line}", file=sys.stderr)
    return {"equal_pairs": len(equal), "silent_chosen": len(silent), "warnings": warnings}


def _warn(found: str, names: Sequence[str]) -> None:
    if names:
        print(f"warning: {len(names)} {found}; the first: {names[0]}", file=sys.stderr)


def _contents(clips: Iterable[Clip], accelerator: Accelerator | None) -> Mapping[Clip, Content]:
    encoded = [clip for clip in clips if isinstance(clip, FileClip | ParquetClip)]
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    own = range(rank, len(encoded), processes)
    with progress(total=len(own), desc="content", unit="clip", disable=rank > 0) as bar:
        found: dict[int, Content] = {}
        for number in own:
            with suppress(OSError, ValueError):
                found[number] = _content(encoded[number])
            bar.update()
    everywhere = gather_object([found]) if processes > 1 else [found]
    return {encoded[number]: content for there in everywhere for number, content in there.items()}


def _content(clip: FileClip | ParquetClip) -> Content:
    read = decode_clip(clip.content())
    digest = hashlib.sha256(read.waveform.tobytes() + read.sampling_rate.to_bytes(4)).hexdigest()
    mono_N = read.waveform.mean(axis=0)
    return digest, bool(np.square(mono_N).mean() < SILENT_MEAN_SQUARE), read.warnings
