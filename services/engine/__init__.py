"""Step-level batching over a model. Knows tensors and devices, no protocol."""

from services.engine.config import EngineConfig
from services.engine.engine import Engine, Result
from services.engine.events import (
    ClipReady,
    Event,
    Failed,
    Finished,
    Preview,
    Progress,
    Queued,
    Timings,
)
from services.engine.jobs import Handle
from services.engine.request import GenerationRequest, Limits, validate, violations
from services.engine.stats import EngineStats

__all__ = [
    "ClipReady",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Event",
    "Failed",
    "Finished",
    "GenerationRequest",
    "Handle",
    "Limits",
    "Preview",
    "Progress",
    "Queued",
    "Result",
    "Timings",
    "validate",
    "violations",
]
