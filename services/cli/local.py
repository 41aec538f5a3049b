"""Clips from an engine in this process, with the service's defaults, limits and encodings. Needs torch."""

import time
from collections.abc import Iterator
from typing import Unpack

from milonga.v1 import generation_pb2 as pb
from services import client
from services.engine import ClipReady, Engine, EngineConfig, Event, Failed, Finished, GenerationRequest
from services.generation import convert
from services.models.loading import load_tango
from services.runtime.model_uri import ResolvedModel, resolve


class LocalSource:
    """Answers as `AudioClient` does, from an engine of its own: the same request gives the same clip."""

    def __init__(self, engine: Engine, model: ResolvedModel) -> None:
        """Take over `engine`, which serves `model`: closing the source closes it."""
        self._engine = engine
        self._model = model.message()
        self._reading = convert.reading_of(engine)

    def stream(self, prompt: str, **options: Unpack[client.GenerationOptions]) -> Iterator[client.Update]:
        """As `AudioClient.stream`. Leaving the loop cancels the rest."""
        request, output = convert.read_request(client.build_request(prompt, **options), **self._reading)
        return self._updates(request, output)

    def _updates(self, request: GenerationRequest, output: convert.OutputFormat) -> Iterator[client.Update]:
        start = time.monotonic()
        for event in self._engine.stream(request):
            yield client.read_update(self._message(event, output, start))

    def _message(
        self, event: Event, output: convert.OutputFormat, start: float
    ) -> pb.StreamGenerateAudioResponse:
        """The message that the service would send; it is read as if it had come over the wire."""
        match event:
            case Failed(error=error):
                raise error
            case ClipReady():
                return pb.StreamGenerateAudioResponse(clip=convert.write_clip(event, output))
            case Finished():
                timings = convert.write_timings(event.timings, time.monotonic() - start)
                return pb.StreamGenerateAudioResponse(
                    finished=pb.FinishedEvent(model=self._model, warnings=event.warnings, timings=timings)
                )
            case _:
                return convert.write_event(event)

    def close(self) -> None:
        """Stop the engine; what runs is given up."""
        self._engine.close(0.0)


def open_local(
    uri: str, *, device: str = "auto", dtype: str = "float32", batch: int | None = None
) -> LocalSource:
    """Resolve, verify and load the model that `uri` names, which takes seconds.

    With `batch`, every denoiser call has that one shape: clips do not depend, not in a bit, on which others
    are made beside them. Without it a call has the smallest shape that fits.

    Raises:
        ModelError: the model was refused.
    """
    model = resolve(uri)
    config = EngineConfig() if batch is None else EngineConfig(batch_shapes=(batch,), exact=True)
    return LocalSource(Engine(load_tango(model.folder, device=device, dtype=dtype), config), model)
