"""The studio: the web door's page to make, compare, explain and rate clips. Needs the extra `studio`.

Start with `page`: `mount`. `making`, `cards`, `versions` and `opinions` know no Gradio.
"""

from importlib.util import find_spec
from typing import Final

PATH: Final = "/studio"
"""Where the page is. `/` leads to it."""


def is_installed() -> bool:
    """Return whether the libraries of the extra `studio` are installed."""
    return find_spec("gradio") is not None
