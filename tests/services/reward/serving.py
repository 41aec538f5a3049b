"""A real server in the test's process, on a thread of its own, and a real (tiny) reward model behind it."""

import asyncio
import io
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import soundfile
import structlog
from numpy.typing import NDArray

from milonga.v1 import audio_pb2
from milonga.v1 import reward_pb2_grpc as rpc
from services.api.model import ModelVersion
from services.models.manifest import write_manifest
from services.models.reward.model import RewardModel
from services.reward.judge import Judge
from services.reward.serve import add_reward
from services.reward.settings import RewardSettings
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import load_settings
from services.weights.uri import ResolvedModel
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
    judge: Judge
    metrics: ServerMetrics


@contextmanager
def serving(model: RewardModel, **settings: Any) -> Iterator[Served]:
    """Serve `model` on a free port until the end of the context."""
    # The access log, written from the server's thread, would land between the tests' dots.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    flags = {"listen": "127.0.0.1:0", "model": "tiny", "threads": 1, "grace_seconds": 0, **settings}
    config = load_settings(RewardSettings, **flags)
    started: Future[tuple[int, Judge, ServerMetrics]] = Future()
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(model, config, started, stop)))
    thread.start()
    try:
        port, judge, metrics = started.result(30)
        target = f"127.0.0.1:{port}"
        options = (("grpc.max_send_message_length", -1),)
        with grpc.insecure_channel(target, options=options) as channel:
            yield Served(target=target, stub=rpc.RewardServiceStub(channel), judge=judge, metrics=metrics)
    finally:
        stop.set()
        thread.join()


async def _serve(
    model: RewardModel,
    settings: RewardSettings,
    started: "Future[tuple[int, Judge, ServerMetrics]]",
    stop: threading.Event,
) -> None:
    try:
        metrics = ServerMetrics()
        server = Server(settings, metrics)
        judge = Judge(model, MODEL, CLAP, settings)
        add_reward(server, metrics, judge, settings)
        await server.start()
        started.set_result((server.port, judge, metrics))
    except BaseException as error:
        started.set_exception(error)
        return
    await asyncio.to_thread(stop.wait)
    await server.stop(0)
    await judge.close()


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
