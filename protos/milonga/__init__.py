"""Milonga: text-to-audio in production, getting better by preference.

::

    from milonga import AudioClient, TangoPipeline

The names below are public, and are imported when they are first used: `AudioClient` needs no torch.
`milonga.v1` holds the generated gRPC stubs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.client import TLS as TLS
    from services.client import AsyncAudioClient as AsyncAudioClient
    from services.client import AudioClient as AudioClient
    from services.client import Best as Best
    from services.client import Captions as Captions
    from services.client import Clip as Clip
    from services.client import Generation as Generation
    from services.client import GenerationModel as GenerationModel
    from services.client import GenerationOptions as GenerationOptions
    from services.client import ModelVersion as ModelVersion
    from services.client import Ranking as Ranking
    from services.client import Rewards as Rewards
    from services.client import Scores as Scores
    from services.errors import MilongaError as MilongaError
    from services.models.clap.loading import load_clap as load_clap
    from services.models.mini import mini_folder as mini_folder
    from services.models.tango.loading import load_tango as load_tango
    from services.models.tango.pipeline import TangoPipeline as TangoPipeline

_HOMES = {
    "TLS": "services.client",
    "AsyncAudioClient": "services.client",
    "AudioClient": "services.client",
    "Best": "services.client",
    "Captions": "services.client",
    "Clip": "services.client",
    "Generation": "services.client",
    "GenerationModel": "services.client",
    "GenerationOptions": "services.client",
    "ModelVersion": "services.client",
    "Ranking": "services.client",
    "Rewards": "services.client",
    "Scores": "services.client",
    "MilongaError": "services.errors",
    "load_clap": "services.models.clap.loading",
    "mini_folder": "services.models.mini",
    "load_tango": "services.models.tango.loading",
    "TangoPipeline": "services.models.tango.pipeline",
}
"""The module of each public name."""

__all__ = list(_HOMES)


if not TYPE_CHECKING:  # so that type checkers report names that do not exist

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'milonga' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
