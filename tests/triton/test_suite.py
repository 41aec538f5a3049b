"""The suite that our own services pass, on a real Triton."""

from tests.inference_suite import *  # noqa: F403  # its tests
