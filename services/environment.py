"""Environment variables that disable telemetry, hub access and progress bars in third-party libraries.

Call `quiet_libraries` before the first import of transformers, diffusers or huggingface_hub, which read the
variables when they are imported. Variables that the user has set stay.
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
    # Artifacts pass through the MLflow server. Otherwise its client requests URLs of the server's S3 storage,
    # which may be unreachable, and waits for minutes.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    # Prompts are short, so threads gain nothing; and tokenizers warn about threads after a fork.
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
"""Variables that are always set."""

HUB_SCHEMES = ("hf", "laion", "laion-clap")
"""Schemes of model URIs that may download from the hub. LAION's checkpoints lack their tokenizer."""

OFFLINE_SWITCHES: dict[str, str] = {"HF_HUB_OFFLINE": "1"}
"""Variables that are set unless a model comes from the hub: an unreachable hub costs minutes of retries."""


def quiet_libraries(*, online: bool = False) -> None:
    """Set every variable that is not set. `online` permits access to the hub, for models of `HUB_SCHEMES`."""
    for name, value in (SWITCHES if online else SWITCHES | OFFLINE_SWITCHES).items():
        os.environ.setdefault(name, value)
