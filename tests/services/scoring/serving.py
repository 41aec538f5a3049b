"""The scoring service in the test's process, with tiny scorers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.models.manifest import write_manifest
from services.runtime.batch_pace import BatchPace
from services.runtime.settings import load_settings
from services.scoring.scorers import Scorer
from services.scoring.serve import SERVICE, load
from services.scoring.settings import ScoringSettings
from tests.services.hosting import Hosted, hosting
from tests.tiny import tiny_clap


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    hosted: Hosted
    scorers: Mapping[str, Scorer]


def save_tiny_clap(folder: Path, seed: int) -> Path:
    """Write a tiny CLAP model and its manifest into `folder`."""
    tiny_clap(seed).save(folder)
    write_manifest(folder, folder.name, "1", "Apache-2.0")
    return folder


def forget_times(scorers: Mapping[str, Scorer]) -> None:
    """Have the next batches be as large as they may be, whatever their times were so far."""
    for scorer in scorers.values():
        for batcher in (scorer.audio, scorer.text):
            batcher._queue.pace = BatchPace()


@contextmanager
def serving(scorers: Mapping[str, str], **settings: Any) -> Iterator[Served]:
    """Load scorers by name and URI, and serve them on a free port until the end of the context."""
    flags = {"listen": "127.0.0.1:0", "grace_seconds": 0, "threads": 1, "device": "cpu", **settings}
    config = load_settings(ScoringSettings, scorers=dict(scorers), **flags)
    loaded = load(config)
    with hosting(SERVICE, loaded, config) as hosted:
        yield Served(hosted=hosted, scorers=loaded)
