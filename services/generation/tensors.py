"""The generation service's model in the Open Inference Protocol: its name and its tensors.

Shapes: n prompts.
"""

from typing import Final

from services.inference import TensorSpec

NAME: Final = "tango"
"""The model's name, whichever weights are served."""

PROMPT: Final = TensorSpec(name="PROMPT", field="prompt", datatype="BYTES", dims=("n",))
NEGATIVE_PROMPT: Final = TensorSpec(
    name="NEGATIVE_PROMPT",
    field="negative_prompt",
    datatype="BYTES",
    dims=("n",),
    optional=True,
    one_for_all=True,
)
SEED: Final = TensorSpec(
    name="SEED", field="seed", datatype="INT64", dims=("n",), optional=True, one_for_all=True
)
NUM_INFERENCE_STEPS: Final = TensorSpec(
    name="NUM_INFERENCE_STEPS",
    field="num_inference_steps",
    datatype="INT32",
    dims=("n",),
    optional=True,
    one_for_all=True,
)
GUIDANCE_SCALE: Final = TensorSpec(
    name="GUIDANCE_SCALE",
    field="guidance_scale",
    datatype="FP32",
    dims=("n",),
    optional=True,
    one_for_all=True,
)
DURATION: Final = TensorSpec(
    name="DURATION", field="duration", datatype="FP32", dims=("n",), optional=True, one_for_all=True
)
SCHEDULER: Final = TensorSpec(
    name="SCHEDULER", field="scheduler", datatype="BYTES", dims=("n",), optional=True, one_for_all=True
)
INPUTS: Final = (PROMPT, NEGATIVE_PROMPT, SEED, NUM_INFERENCE_STEPS, GUIDANCE_SCALE, DURATION, SCHEDULER)

OUTPUTS: Final = (
    TensorSpec(name="AUDIO", field="audio", datatype="FP32", dims=("n", "samples")),
    TensorSpec(name="SAMPLE_RATE", field="sample_rate_hertz", datatype="INT32", dims=(1,)),
    TensorSpec(name="SEED", field="seed", datatype="INT64", dims=("n",)),
    TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n",)),
    TensorSpec(name="ROW", field="row", datatype="INT32", dims=(1,), optional=True),
    TensorSpec(name="PROGRESS", field="progress", datatype="FP32", dims=(1,), optional=True),
)
"""Of a stream, each answer is of one row, which ROW tells: PROGRESS on the way, the others with its clip."""

PART: Final = "tango"
"""Its weights in a version folder of a Triton repository."""
