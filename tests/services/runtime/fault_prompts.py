"""Prompts by which callers ask a test's model for faults: without torch, for clients."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

HANG, EXIT, ERROR, BREAK, NAN, LARGE = "hang", "exit", "error", "break", "nan", "large"
"""Prompts of faults. After `BREAK` every call of the model fails, as after a sticky error of CUDA."""

FAULT_TOKENS: Final[Mapping[str, int]] = MappingProxyType(
    {ERROR: 27, LARGE: 28, NAN: 29, HANG: 30, BREAK: 31}
)
"""The same for a captioner, which has no prompts: a maximum number of tokens by fault."""
