"""The explanation service's model in a Triton repository.

`model.py` of an exported version imports `open_model`.
"""

from collections.abc import Mapping
from typing import Any, Final

from services.catalogue import EXPLANATION
from services.explanation.inference import INPUTS, OUTPUTS, ExplanationInference
from services.explanation.settings import ExplanationSettings, model_uris
from services.inference.metadata import write_config
from services.inference.triton.backend import LoadedModel
from services.inference.triton.serving import Servable
from services.weights.uri import ResolvedModel


def configure(settings: ExplanationSettings, found: Mapping[str, ResolvedModel]) -> Any:
    """See `Servable.configure`."""
    return write_config(EXPLANATION.model, INPUTS, OUTPUTS, 0, decoupled=True)


async def load(settings: ExplanationSettings, found: Mapping[str, ResolvedModel]) -> LoadedModel:
    """See `Servable.load`."""
    from services.explanation import loading
    from services.explanation.servicer import ExplanationServicer

    worker = loading.load(settings, found)
    model = ExplanationInference(ExplanationServicer(worker))
    return LoadedModel(model=model, close=worker.batcher.close, watch=worker.batcher.watch)


SERVABLE: Final = Servable(
    entry=EXPLANATION, settings=ExplanationSettings, uris=model_uris, configure=configure, load=load
)
open_model = SERVABLE.open
