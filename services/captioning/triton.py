"""The captioning service's model in a Triton repository.

`model.py` of an exported version imports `open_model`.
"""

from collections.abc import Mapping
from typing import Any, Final

from services.captioning.inference import OUTPUTS, CaptioningInference
from services.captioning.settings import CaptioningSettings, model_uris
from services.catalogue import CAPTIONING
from services.inference.metadata import write_config
from services.inference.pairs import CLIPS
from services.inference.triton.backend import LoadedModel
from services.inference.triton.serving import Servable
from services.weights.uri import ResolvedModel


def configure(settings: CaptioningSettings, found: Mapping[str, ResolvedModel]) -> Any:
    """See `Servable.configure`."""
    return write_config(CAPTIONING.model, CLIPS, OUTPUTS, settings.max_batch_size, decoupled=False)


async def load(settings: CaptioningSettings, found: Mapping[str, ResolvedModel]) -> LoadedModel:
    """See `Servable.load`."""
    from services.captioning import loading
    from services.captioning.servicer import CaptioningServicer

    loaded = loading.load(settings, found)
    servicer = CaptioningServicer(loaded.worker, settings, loaded.refiner)
    return LoadedModel(
        model=CaptioningInference(servicer), close=loaded.close, watch=loaded.worker.batcher.watch
    )


SERVABLE: Final = Servable(
    entry=CAPTIONING, settings=CaptioningSettings, uris=model_uris, configure=configure, load=load
)
open_model = SERVABLE.open
