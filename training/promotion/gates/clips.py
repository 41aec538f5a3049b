"""The clips of a challenger, by gRPC: what gates hear is what callers would.

Clips are kept under the digest of the weights, the way they are served, and the settings, a file a prompt and
seed; so the champion's are there for the next promotion, and the live service is never asked.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from services.errors import InvalidInputError, MilongaError
from services.weights.registry import cache_folder
from training.data.store import RowLog, digest_of, side_by_side
from training.evaluation.sources import Asked
from training.loop.progress import progress
from training.loop.run_folder import write_atomically
from training.promotion.errors import RolloutError
from training.promotion.gates.gates import GatesConfig
from training.promotion.targets.clip_clients import ClipClient, MadeClip

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
    open_client: Callable[[], ClipClient],
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
    files = {asked: folder / f"{digest_of([asked.prompt.text, asked.seed])[:24]}.wav" for asked in plan}
    with RowLog(folder / TIMES) as log:
        seconds = {str(row["file"]): float(row["seconds"]) for row in log.rows}
        missing = [a for a, path in files.items() if path.name not in seconds or not _is_whole(path)]
        if missing:
            with closing(open_client()) as client:
                # The first call is slower, and counts for nobody.
                _generate(client, missing[0], config, digest)
                made = side_by_side(
                    lambda asked: _generate(client, asked, config, digest),
                    *(missing, config.in_flight, client.close),
                )
                for asked, clip in progress(made, desc=name, total=len(missing), unit="clip"):
                    write_atomically(files[asked], clip.wav)
                    seconds[files[asked].name] = clip.seconds
                    log.append({"file": files[asked].name, "seconds": clip.seconds})
    times = [max(seconds[path.name], 1e-9) for path in files.values()]
    return ServedClips(files=tuple(files.values()), seconds_N=np.array(times), made=len(missing))


def _generate(client: ClipClient, asked: Asked, config: GatesConfig, digest: str) -> MadeClip:
    try:
        made = client.generate(asked.prompt.text, asked.seed, config.evaluation.sampling)
    except InvalidInputError:
        raise
    except MilongaError as error:
        raise RolloutError(f"the challenger made no clip of {asked.prompt.text!r}: {error}") from error
    if made.digest != digest:
        raise RolloutError(
            f"the challenger answered with {made.digest}, expected {digest}: somebody else changed it"
        )
    return made


def _is_whole(path: Path) -> bool:
    try:
        return bool(soundfile.info(path).frames)
    except (OSError, RuntimeError):  # RuntimeError: libsndfile's
        return False
