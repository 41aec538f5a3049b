"""A real server in the test's process, on a thread of its own, and a real (tiny) reward model behind it."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import soundfile
from numpy.typing import NDArray

from milonga.v1 import audio_pb2
from milonga.v1 import reward_pb2_grpc as rpc
from services.api.model import ModelVersion
from services.models.manifest import write_manifest
from services.models.reward.model import RewardModel
from services.reward.model import RewardScorer
from services.reward.serve import SERVICE
from services.reward.settings import RewardSettings
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import load_settings
from services.weights.uri import ResolvedModel
from tests.services.hosting import hosting
from tests.tiny import tiny_clap, tiny_reward

CLAP = ResolvedModel(
    folder=Path("clap"),
    identity=ModelVersion(name="tiny-clap", version="1", digest="sha256:" + "0" * 64, license="Apache-2.0"),
)
MODEL = ResolvedModel(
    folder=Path("tiny"),
    identity=ModelVersion(name="tiny", version="2", digest="sha256:" + "1" * 64, license="Apache-2.0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    target: str
    stub: rpc.RewardServiceStub
    scorer: RewardScorer
    metrics: ServerMetrics
    server: Server


@contextmanager
def serving(model: RewardModel, **settings: Any) -> Iterator[Served]:
    """Serve `model` on a free port until the end of the context."""
    flags = {"listen": "127.0.0.1:0", "model": "tiny", "threads": 1, "grace_seconds": 0, **settings}
    config = load_settings(RewardSettings, **flags)
    scorer = RewardScorer(model, MODEL, CLAP, config)
    options = (("grpc.max_send_message_length", -1),)
    with (
        hosting(SERVICE, scorer, config) as hosted,
        grpc.insecure_channel(hosted.target, options=options) as channel,
    ):
        stub = rpc.RewardServiceStub(channel)
        yield Served(
            target=hosted.target, stub=stub, scorer=scorer, metrics=hosted.metrics, server=hosted.server
        )


def write_models(folder: Path) -> tuple[Path, Path]:
    """Save a tiny CLAP model and a tiny reward model that stands on it. Returns their folders."""
    clap, clap_folder, reward_folder = tiny_clap(), folder / "clap", folder / "reward"
    clap.save(clap_folder)
    digest = write_manifest(clap_folder, name="tiny-clap", version="1", license="Apache-2.0").digest
    tiny_reward(clap, digest).save(reward_folder)
    write_manifest(reward_folder, name="tiny-reward", version="2", license="Apache-2.0")
    return clap_folder, reward_folder


def tone(seconds: float = 0.5, *, hertz: float = 440.0, rate: int = 16_000) -> NDArray[np.float32]:
    """A sine, [N]."""
    times_N = np.arange(round(seconds * rate)) / rate
    sine_N: NDArray[np.float32] = (0.5 * np.sin(2 * np.pi * hertz * times_N)).astype(np.float32)
    return sine_N


def wav(waveform: NDArray[np.float32], rate: int = 16_000) -> audio_pb2.Clip:
    """A WAV file of samples, [N] or [N, channels]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="WAV")
    return audio_pb2.Clip(audio=buffer.getvalue(), encoding=audio_pb2.AUDIO_ENCODING_WAV)


def float32(waveform: NDArray[np.float32], rate: int = 16_000) -> audio_pb2.Clip:
    """Bare samples."""
    return audio_pb2.Clip(
        audio=waveform.astype("<f4").tobytes(),
        encoding=audio_pb2.AUDIO_ENCODING_FLOAT32,
        sample_rate_hertz=rate,
    )
