"""The clips of a challenger, by gRPC: what gates hear is what callers would.

Clips are kept under the digest of the weights, the way they are served, and the settings, a file a prompt and
seed; so the champion's are there for the next promotion, and the live service is never asked.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.api.generation import ClipMaker, Generation
from services.clip_folder import ClipFolder
from services.errors import InvalidInputError, MilongaError
from services.files import write_atomically
from services.weights.registry import cache_folder
from training.data.store import RowLog, digest_of
from training.evaluation.sources import Asked, file_name, options_of
from training.loop.progress import progress
from training.promotion.errors import RolloutError
from training.promotion.gates.gates import GatesConfig

TIMES = "times.jsonl"
"""Seconds that each clip took. A clip without is made again."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServedClips:
    """Clips in the order of the plan."""

    files: tuple[Path, ...]
    seconds_N: NDArray[np.float64]
    """From request to clip, as a service counts them; of a Triton, which does not, as its client does."""
    made: int
    """How many were not there before."""


def clips_folder(digest: str, serving: str, config: GatesConfig) -> Path:
    """Where the clips of some weights are kept."""
    settings = {
        "model": digest,
        "serving": serving,
        "in_flight": config.in_flight,
        **asdict(config.evaluation.sampling),
    }
    folder = cache_folder() / "promotion" / "clips" / digest_of(settings)[:16]
    if not (folder / "settings.json").exists():
        write_atomically(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
    return folder


def served_clips(
    name: str,
    digest: str,
    plan: Sequence[Asked],
    folder: Path,
    config: GatesConfig,
    open_client: Callable[[], ClipMaker],
) -> ServedClips:
    """The clips of `plan`, asked for as far as they are not in `folder`.

    Args:
        name: for people.
        digest: of the weights that must answer.
        plan: prompts and seeds.
        folder: as `clips_folder`.
        config: how clips are asked for.
        open_client: starts who is asked; called only if something is missing.

    Raises:
        InvalidInputError: it refuses a prompt or a setting.
        RolloutError: it fails, or other weights answer.
        OutputError: `folder` can't be written.
    """
    clips: ClipFolder[Asked] = ClipFolder(folder, lambda asked: [file_name(asked)])
    with RowLog(folder / TIMES) as log:
        seconds = {str(row["file"]): float(row["seconds"]) for row in log.rows}
        torn = set(clips.missing(plan))
        missing = [asked for asked in plan if asked in torn or file_name(asked) not in seconds]
        if missing:
            with closing(open_client()) as client:
                make = partial(_generate, client, config=config, digest=digest)
                make(missing[0])  # The first call is slower, and is not timed.
                made = clips.make(missing, make, config.in_flight, stop=client.close)
                for asked, generation in progress(made, desc=name, total=len(missing), unit="clip"):
                    seconds[file_name(asked)] = generation.timings.total
                    log.append({"file": file_name(asked), "seconds": generation.timings.total})
    files = tuple(clips.paths(asked)[0] for asked in plan)
    times = [max(seconds[path.name], 1e-9) for path in files]
    return ServedClips(files=files, seconds_N=np.array(times), made=len(missing))


def _generate(client: ClipMaker, asked: Asked, *, config: GatesConfig, digest: str) -> Generation:
    options = options_of(asked, config.evaluation.sampling)
    try:
        made = client.generate(asked.prompt.text, **options)
    except InvalidInputError:
        raise
    except MilongaError as error:
        raise RolloutError(f"the challenger made no clip of {asked.prompt.text!r}: {error}") from error
    if made.model.digest != digest:
        raise RolloutError(
            f"the challenger answered with {made.model.digest}, expected {digest}: somebody else changed it"
        )
    return made
