"""The identity of weights."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """Which weights these are. Equal versions are equal files."""

    name: str
    """Name of the model, as responses and registries show it."""
    version: str
    """Version of the weights; ``unversioned`` where nothing states one."""
    digest: str
    """``sha256:`` and the hex digest over every file."""
    license: str
    """SPDX identifier of the weights' licence, or ``unknown``."""


UNVERSIONED = ModelVersion(name="unnamed", version="unversioned", digest="", license="unknown")
"""Weights that were made in this process and belong to no folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSwitch:
    """What a service served before a switch of models, and what it serves now."""

    previous: ModelVersion
    current: ModelVersion
    seconds: float
    """Until new requests started on `current`."""
