"""The candidates stage as a program of its own, for the test that kills it.

python -m tests.training.preferences.candidates_program MODEL CAPTIONS PERTURBED OUTPUT
"""

import sys
from pathlib import Path

from training.preferences.candidates import CandidatesConfig, make_candidates
from training.preferences.sources import SourceConfig


def config(model: str) -> CandidatesConfig:
    """Two dozen clips, a few at a time."""
    return CandidatesConfig(
        source=SourceConfig(model=model, device="cpu", threads=1, batch=2, in_flight=3),
        strategies=("1.2",),
        steps=4,
        clips=8,
        duration=0.32,
    )


if __name__ == "__main__":
    model, captions, perturbed, output = sys.argv[1:]
    make_candidates(config(model), Path(captions), Path(perturbed), Path(output))
