"""The scoring service's model in a Triton repository.

`model.py` of an exported version imports `open_model`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from services.catalogue import SCORING
from services.inference.metadata import write_config
from services.inference.pairs import INPUTS
from services.inference.triton.backend import LoadedModel
from services.inference.triton.serving import Servable
from services.scoring.inference import ScoringInference, outputs_of
from services.scoring.serve import close, watch
from services.scoring.settings import ScoringSettings, model_uris
from services.weights.uri import ResolvedModel


def configure(settings: ScoringSettings, found: Mapping[str, ResolvedModel]) -> Any:
    """See `Servable.configure`."""
    outputs = outputs_of(len(found))
    return write_config(SCORING.model, INPUTS, outputs, settings.max_batch_size, decoupled=False)


async def load(settings: ScoringSettings, found: Mapping[str, ResolvedModel]) -> LoadedModel:
    """See `Servable.load`."""
    from services.scoring import scorers
    from services.scoring.servicer import ScoringServicer

    loaded = scorers.load(settings, found)
    return LoadedModel(
        model=ScoringInference(ScoringServicer(loaded, settings)),
        close=partial(close, loaded),
        watch=partial(watch, loaded),
    )


SERVABLE: Final = Servable(
    entry=SCORING, settings=ScoringSettings, uris=model_uris, configure=configure, load=load
)
open_model = SERVABLE.open
