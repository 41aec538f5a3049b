"""The web door: HTTP in front of the gRPC services, in the shapes that existing clients already speak.

No model runs here. Start with `app`: `build_app`. Needs the extra `web`.
"""

from importlib.util import find_spec
from typing import Final

NAME: Final = "web"
"""Its sub-command of `milonga serve`, and its name in `milonga up`."""
SUMMARY: Final = "Serve HTTP in front of the services: clips, scores and captions for clients without gRPC."
SERVICES: Final = ("generation", "scoring", "reward", "captioning")
"""The services that it calls. Explanations have no HTTP form."""
PORT: Final = 8080
"""Default port."""
EXAMPLE: Final = """curl {}/v1/audio/generate -d '{{"input": "A dog barks"}}' -o clip.wav"""
"""A command that calls it, with its address as ``{}``."""


def is_installed() -> bool:
    """Return whether the libraries of the extra `web` are installed."""
    return find_spec("fastapi") is not None and find_spec("uvicorn") is not None
