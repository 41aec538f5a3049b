"""The suite that our own services pass, on a real Triton."""

from tests.services.inference.suite import *  # noqa: F403  # its tests
