"""Prompts by which callers ask a test's model for faults: without torch, for clients."""

HANG, EXIT, ERROR, BREAK, NAN, LARGE = "hang", "exit", "error", "break", "nan", "large"
"""Prompts of faults. After `BREAK` every call of the model fails, as after a sticky error of CUDA."""
