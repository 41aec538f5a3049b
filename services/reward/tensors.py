"""The reward service's model in the Open Inference Protocol: its name and its tensors.

Shapes: n pairs.
"""

from typing import Final

from services.inference import TensorSpec
from services.inference.pairs import INPUTS

__all__ = ["CLAP", "INPUTS", "NAME", "OUTPUTS", "REWARD"]

NAME: Final = "reward"
"""The model's name, whichever weights are served."""

OUTPUTS: Final = (
    TensorSpec(name="REWARD", field="logit", datatype="FP32", dims=("n", 1)),
    TensorSpec(name="PROBABILITY", field="probability", datatype="FP32", dims=("n", 1)),
    TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n", 1)),
)

REWARD: Final = "reward"
CLAP: Final = "clap"
"""Its weights in a version folder of a Triton repository: the model, and what it stands on."""
