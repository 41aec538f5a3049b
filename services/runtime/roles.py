"""Which roles may call which rpc. A method that is not listed may be called by nobody.

Health and reflection are not in the table: they are open, if they are served.
"""

from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Final

from services.runtime.callers import Role

WORK: Final[Set[Role]] = frozenset({"caller", "batch"})
"""Roles that may use the device."""
OPERATION: Final[Set[Role]] = frozenset({"operator"})
"""The role that may change what is served."""
READING: Final[Set[Role]] = frozenset({"caller", "batch", "operator", "observer"})
"""Roles that may read what is served."""

_METHODS: Final[Mapping[str, Mapping[Set[Role], tuple[str, ...]]]] = {
    "milonga.v1.GenerationService": {WORK: ("GenerateAudio", "StreamGenerateAudio"), READING: ("GetModel",)},
    "milonga.v1.ScoringService": {
        WORK: ("BatchScoreAudio", "BatchEmbedAudio", "BatchEmbedText"),
        READING: ("ListScorers",),
    },
    "milonga.v1.RewardService": {
        WORK: ("BatchComputeRewards", "RankAudio"),
        READING: ("GetRewardModel",),
    },
    "milonga.v1.CaptioningService": {WORK: ("CaptionAudio",), READING: ("GetCaptioner",)},
    "milonga.v1.ExplanationService": {WORK: ("ExplainAudio",), READING: ("GetExplainer",)},
    "milonga.v1.OperatorService": {OPERATION: ("SwitchModel",)},
    "inference.GRPCInferenceService": {
        WORK: ("ModelInfer", "ModelStreamInfer"),
        OPERATION: ("RepositoryModelLoad", "RepositoryModelUnload"),
        READING: (
            "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex",
            # Not offered by any service: the answer says so.
            "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
            "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister",
            "TraceSetting", "LogSettings",
        ),
    },
}  # fmt: skip

OPEN: Final = frozenset(
    f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")
)
"""Probes: anybody may call them."""

ROLES: Final[Mapping[str, Set[Role]]] = MappingProxyType(
    {
        f"/{service}/{name}": roles
        for service, methods in _METHODS.items()
        for roles, names in methods.items()
        for name in names
    }
)
"""Roles by full name of the method, each of which suffices."""
