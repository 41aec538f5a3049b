"""The Python client of the services: `AudioClient`, and `AsyncAudioClient` for asyncio.

::

    with AudioClient("localhost:50051", scoring="localhost:50052", reward="localhost:50053") as client:
        generation = client.generate("A dog barks then a siren wails", seed=7)
        Path("clip.wav").write_bytes(generation.clips[0].audio)
        client.score_audio([("A dog barks then a siren wails", generation.clips[0])]).values
        best = client.generate_best("A dog barks then a siren wails", candidates=4)

Needs the light base install only: no torch. Every rpc is written once (`rpcs`), as a coroutine over one of
two ways to wait (`transport`); errors are those of `services.errors`.
"""

from services.client.answers import (
    Best,
    Clip,
    Embeddings,
    Finished,
    Generation,
    JudgedClip,
    ModelSwitch,
    ModelVersion,
    Preview,
    Progress,
    Queued,
    RankBy,
    RankedClip,
    Ranking,
    Reward,
    Rewards,
    Scorer,
    Scores,
    Timings,
    Update,
)
from services.client.clients import AsyncAudioClient, AudioClient
from services.client.connection import (
    DEFAULT_TIMEOUT_SECONDS,
    MAX_RESPONSE_BYTES,
    TLS,
    ConnectionOptions,
)
from services.client.generation import (
    MAX_TEXT_BYTES,
    GenerationOptions,
    build_request,
    read_response,
    read_update,
)
from services.client.sounds import MAX_REQUEST_BYTES, Sound

__all__ = [
    "DEFAULT_TIMEOUT_SECONDS",
    "MAX_REQUEST_BYTES",
    "MAX_RESPONSE_BYTES",
    "MAX_TEXT_BYTES",
    "TLS",
    "AsyncAudioClient",
    "AudioClient",
    "Best",
    "Clip",
    "ConnectionOptions",
    "Embeddings",
    "Finished",
    "Generation",
    "GenerationOptions",
    "JudgedClip",
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
    "Sound",
    "Timings",
    "Update",
    "build_request",
    "read_response",
    "read_update",
]
