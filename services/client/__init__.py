"""The Python client of the services: `AudioClient`, and `AsyncAudioClient` for asyncio.

::

    with AudioClient("localhost:50051", scoring="localhost:50052", reward="localhost:50053") as client:
        generation = client.generate("A dog barks then a siren wails", seed=7)
        Path("clip.wav").write_bytes(generation.clips[0].audio)
        client.score_audio([("A dog barks then a siren wails", generation.clips[0])]).values
        best = client.generate_best("A dog barks then a siren wails", candidates=4)

    with AudioClient(captioning="localhost:50054") as client:
        client.caption_audio([Path("clip.wav")]).captions[0].text

    with AudioClient(explanation="localhost:50055") as client:
        client.explain_audio("A dog barks then a siren wails", seed=7).matrix_WT

Needs the light base install only: no torch. Values are those of `services.api`, errors those of
`services.errors`.
"""

from services.api.best import Best, Candidate, RankBy
from services.api.captioning import Caption, CaptionCandidate, CaptionOptions, Captions, CaptionTimings
from services.api.explanation import (
    ExplainerModel,
    Explanation,
    ExplanationOptions,
    ExplanationProgress,
    ExplanationUpdate,
    Variant,
)
from services.api.generation import (
    Clip,
    Finished,
    Generation,
    GenerationModel,
    GenerationOptions,
    Preview,
    Progress,
    Queued,
    Timings,
    Update,
)
from services.api.model import ModelSwitch, ModelVersion
from services.api.scoring import Embeddings, RankedClip, Ranking, Reward, Rewards, Scorer, Scores, Sound
from services.client.addresses import address_fault
from services.client.clients import AsyncAudioClient, AudioClient
from services.client.connection import (
    DEFAULT_TIMEOUT_SECONDS,
    MAX_RESPONSE_BYTES,
    TLS,
    TOKEN_FILE_VARIABLE,
    ConnectionOptions,
)
from services.client.generation import MAX_TEXT_BYTES, build_request, read_response, read_update
from services.client.options import OPTION_NAMES, ServiceOptions
from services.client.sounds import MAX_REQUEST_BYTES

__all__ = [
    "DEFAULT_TIMEOUT_SECONDS",
    "MAX_REQUEST_BYTES",
    "MAX_RESPONSE_BYTES",
    "MAX_TEXT_BYTES",
    "OPTION_NAMES",
    "TLS",
    "TOKEN_FILE_VARIABLE",
    "AsyncAudioClient",
    "AudioClient",
    "Best",
    "Candidate",
    "Caption",
    "CaptionCandidate",
    "CaptionOptions",
    "CaptionTimings",
    "Captions",
    "Clip",
    "ConnectionOptions",
    "Embeddings",
    "ExplainerModel",
    "Explanation",
    "ExplanationOptions",
    "ExplanationProgress",
    "ExplanationUpdate",
    "Finished",
    "Generation",
    "GenerationModel",
    "GenerationOptions",
    "ModelSwitch",
    "ModelVersion",
    "Preview",
    "Progress",
    "Queued",
    "RankBy",
    "RankedClip",
    "Ranking",
    "Reward",
    "Rewards",
    "Scorer",
    "Scores",
    "ServiceOptions",
    "Sound",
    "Timings",
    "Update",
    "Variant",
    "address_fault",
    "build_request",
    "read_response",
    "read_update",
]
