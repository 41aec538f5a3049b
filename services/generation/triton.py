"""The generation service's model, for a Triton repository.

`model.py` of an exported version imports `open_model`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from services.catalogue import GENERATION
from services.errors import invalid
from services.generation.inference import INPUTS, OUTPUTS, GenerationInference
from services.generation.settings import GenerationSettings, model_uris
from services.inference.metadata import write_config
from services.inference.triton.backend import LoadedModel
from services.inference.triton.serving import Servable
from services.weights.uri import ResolvedModel


def configure(settings: GenerationSettings, found: Mapping[str, ResolvedModel]) -> Any:
    """See `Servable.configure`."""
    model = found[GENERATION.model]
    if not (model.folder / "model_index.json").exists():
        description = f"is {settings.model}, which makes no sound: it has no model_index.json"
        raise invalid("model", description)
    return write_config(GENERATION.model, INPUTS, OUTPUTS, 0, decoupled=True)


async def load(settings: GenerationSettings, found: Mapping[str, ResolvedModel]) -> LoadedModel:
    """See `Servable.load`."""
    from services.generation.slot import EngineSlot, Served, load_engine

    model = found[GENERATION.model]
    slot = EngineSlot(Served(load_engine(settings, model), model.folder), partial(load_engine, settings))
    return LoadedModel(model=GenerationInference(slot), close=slot.close, watch=slot.watch)


SERVABLE: Final = Servable(
    entry=GENERATION, settings=GenerationSettings, uris=model_uris, configure=configure, load=load
)
open_model = SERVABLE.open
