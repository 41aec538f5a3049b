"""The scoring service's model in the Open Inference Protocol: its name and its tensors.

Shapes: n pairs.
"""

from collections.abc import Sequence
from typing import Final

from services.inference import TensorSpec
from services.inference.pairs import INPUTS

__all__ = ["INPUTS", "NAME", "outputs_of"]

NAME: Final = "clap"
"""The model's name, whichever scorers are served."""


def outputs_of(scorers: int) -> Sequence[TensorSpec]:
    """What so many scorers make: a column each."""
    return (
        TensorSpec(name="SCORE", field="scores", datatype="FP32", dims=("n", scorers)),
        TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n", scorers)),
    )
