"""Identity of weights, and the result of a switch of models."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """Identity of weights. Equal versions have equal files."""

    name: str
    """Name of the model, as responses and registries show it."""
    version: str
    """Version of the weights; ``unversioned`` if none is stated."""
    digest: str
    """``sha256:`` and the hex digest over every file."""
    license: str
    """SPDX identifier of the weights' licence, or ``unknown``."""


UNVERSIONED = ModelVersion(name="unnamed", version="unversioned", digest="", license="unknown")
"""Version of weights that were made in this process and are in no folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSwitch:
    """The served models before and after a switch."""

    previous: ModelVersion
    current: ModelVersion
    seconds: float
    """Time until new requests started on `current`."""
