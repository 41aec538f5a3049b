"""The one place with the environment switches that keep libraries from calling elsewhere, and quiet.

Call `quiet_libraries` before the first import of transformers, diffusers or huggingface_hub: they read the
switches when they are imported. What the user has set already stays as it is.
"""

import os

SWITCHES: dict[str, str] = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    # Artifacts pass through the MLflow server. Otherwise its client asks for addresses in the server's S3,
    # which may be out of reach, and waits for minutes.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    # Prompts are short: threads gain nothing, and a later fork makes tokenizers warn about them.
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
"""Set everywhere."""

OFFLINE_SWITCHES: dict[str, str] = {"HF_HUB_OFFLINE": "1"}
"""Set unless a model is fetched from the hub on purpose: an unreachable hub costs minutes of retries."""


def quiet_libraries(*, online: bool = False) -> None:
    """Set every switch that is not set yet. `online` lets huggingface_hub reach the hub (``hf:`` models)."""
    for name, value in (SWITCHES if online else SWITCHES | OFFLINE_SWITCHES).items():
        os.environ.setdefault(name, value)
