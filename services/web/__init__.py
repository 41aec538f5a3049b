"""The web door: HTTP in front of the gRPC services, in the shapes that existing clients already speak.

No model runs here. Start with `app`: `build_app`. Needs the extra `web`.
"""

from importlib.util import find_spec
from typing import Final

NAME: Final = "web"
"""Its sub-command of `milonga serve`, and its name in `milonga up`."""
SUMMARY: Final = "Serve HTTP in front of the services: clips, scores and captions for clients without gRPC."
PORT: Final = 8080
"""Default port."""
SERVICES: Final = ("generation", "scoring", "reward", "captioning", "explanation")
"""Services that it calls: each is a setting with an address."""
EXAMPLE: Final = """curl {}/v1/audio/generate -d '{{"input": "A dog barks"}}' -o clip.wav"""
"""A command that calls it, with its address as ``{}``."""


def is_installed() -> bool:
    """Return whether the libraries of the extra `web` are installed."""
    return find_spec("fastapi") is not None and find_spec("uvicorn") is not None
