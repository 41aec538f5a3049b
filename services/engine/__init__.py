"""Step-level batching over a model. Knows tensors and devices, no protocol."""

from services.api.engine import EngineConfig
from services.engine.engine import Engine
from services.engine.states import Handle
from services.engine.stats import EngineStats

__all__ = ["Engine", "EngineConfig", "EngineStats", "Handle"]
