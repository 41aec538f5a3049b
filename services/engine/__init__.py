"""The engine: step-level batching of requests over one model. Knows no protocol."""

from services.api.engine import EngineConfig
from services.engine.engine import Engine
from services.engine.states import Handle
from services.engine.stats import EngineStats

__all__ = ["Engine", "EngineConfig", "EngineStats", "Handle"]
