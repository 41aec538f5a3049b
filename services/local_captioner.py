"""`ClipCaptioner` in this process, with the service's defaults and limits. Needs torch.

Not in `services.local`, which training imports: what trains generators must not reach a captioner.
"""

import threading
import time
from collections.abc import Sequence
from typing import Final, Unpack

import numpy as np
from numpy.typing import NDArray

from milonga.v1.scoring_pb2 import ListScorersResponse
from services.api.best import run
from services.api.captioning import CaptionOptions, Captions, ClipCaptioner
from services.api.scoring import Embeddings, Sound
from services.audio.clips import read_clips
from services.audio.decoding import MIN_SECONDS
from services.audio.levels import has_sound
from services.captioning.loading import load_model
from services.captioning.model import MAX_SECONDS, CaptionJob, CaptionModel, bounds_of, complete
from services.captioning.refine import ScoringRefiner, refine
from services.captioning.servicer import read_options
from services.captioning.settings import CaptioningSettings
from services.client import AudioClient
from services.client.captioning import caption_request
from services.local import passes
from services.runtime.decoding import also
from services.weights.uri import ResolvedModel

_MAX_BATCH_SECONDS: Final[float] = CaptioningSettings.model_fields["max_batch_seconds"].default
"""Maximum seconds of audio in one batch, as in the service; bounds its memory."""
_MAX_CLIPS: Final[int] = CaptioningSettings.model_fields["max_batch_size"].default
"""Maximum number of clips of a call of the service."""


class LocalCaptioner:
    """A `ClipCaptioner` with models in this process. Thread-safe: calls run one at a time."""

    def __init__(self, model: CaptionModel, scoring: AudioClient | None = None) -> None:
        """`scoring`: reaches a scoring service, which then chooses among candidates; closed by `close`."""
        self._model, self._lock = model, threading.Lock()
        self._refiner = None if scoring is None else ScoringRefiner(_BlockingScoring(scoring))

    def caption_audio(self, clips: Sequence[Sound], **options: Unpack[CaptionOptions]) -> Captions:
        """See `ClipCaptioner`. There may be more clips than in a call of a service."""
        start, model = time.monotonic(), self._model
        message = caption_request(clips, **options)
        request, faults = read_options(message, model.defaults)
        with also(faults):
            read = read_clips(message.clips, "clips", bounds_of(max(_MAX_CLIPS, len(message.clips))))
        prepared = [model.prepare(clip, request) for clip in read]
        ready = time.monotonic()
        jobs = [CaptionJob(prepared=one, request=request) for one in prepared]
        costs = [model.cost(one.seconds, request) for one in prepared]
        with self._lock:
            parts = passes(costs, _MAX_BATCH_SECONDS)
            drafts = [draft for part in parts for draft in model.describe(jobs[part])]
            described = time.monotonic()
            refined = run(refine(model, self._refiner, request, prepared, drafts))
        end = time.monotonic()
        times = {"prepare": ready - start, "refine": end - described, "total": end - start}
        return complete(model, request, prepared, drafts, refined, **times)

    def close(self) -> None:
        """See `ClipCaptioner`."""
        if self._refiner is not None:
            run(self._refiner.close())


class _BlockingScoring:
    """An `AudioClient` as `ScoringClient`: coroutines that never suspend."""

    def __init__(self, client: AudioClient) -> None:
        self._client = client

    async def list_scorers(self, *, timeout: float | None = None) -> ListScorersResponse:
        return self._client.list_scorers(timeout=timeout)

    async def embed_audio(
        self, clips: Sequence[Sound], *, scorers: Sequence[str] | None = None, timeout: float | None = None
    ) -> Embeddings:
        return self._client.embed_audio(clips, scorers=scorers, timeout=timeout)

    async def embed_text(
        self, prompts: Sequence[str], *, scorers: Sequence[str] | None = None, timeout: float | None = None
    ) -> Embeddings:
        return self._client.embed_text(prompts, scorers=scorers, timeout=timeout)

    async def close(self) -> None:
        self._client.close()


def open_captioner(
    captioner: ResolvedModel,
    *,
    clap: ResolvedModel | None = None,
    scoring: AudioClient | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> LocalCaptioner:
    """Load a captioner, and the CLAP model that chooses among its candidates, if any; takes seconds.

    Args:
        captioner: the captioner.
        clap: the CLAP model; None: none in this process.
        scoring: reaches a scoring service that chooses, if `clap` is None.
        device: torch's name of a device, or ``auto``.
        dtype: float type of the language model.

    Raises:
        ModelError: a model was refused.
        InvalidInputError: the device does not exist.
    """
    model = load_model(captioner, clap, device=device, dtype=dtype, sends=scoring is not None)
    return LocalCaptioner(model, scoring)


def describe(captioner: ClipCaptioner, clips: Sequence[tuple[NDArray[np.float32], int]]) -> list[str]:
    """Return the caption of each generated clip, empty if there is nothing in it.

    A captioner refuses clips without sound, which a generator may make. A clip longer than `MAX_SECONDS` is
    described by its beginning.

    Args:
        captioner: writes the captions.
        clips: samples [N] in [-1, 1] and sampling rate in hertz of each clip.
    """
    audible = {
        index: (waveform_N[: int(MAX_SECONDS * rate)], rate)
        for index, (waveform_N, rate) in enumerate(clips)
        if len(waveform_N) >= MIN_SECONDS * rate and has_sound(waveform_N[: int(MAX_SECONDS * rate)])
    }
    captions = captioner.caption_audio(list(audible.values())).captions if audible else ()
    texts = dict(zip(audible, (one.text for one in captions), strict=True))
    return [texts.get(index, "") for index in range(len(clips))]
