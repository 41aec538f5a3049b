"""The reward service's model in a Triton repository.

`model.py` of an exported version imports `open_model`.
"""

from collections.abc import Mapping
from typing import Any, Final

from services.catalogue import REWARD
from services.inference.metadata import write_config
from services.inference.pairs import INPUTS
from services.inference.triton.backend import LoadedModel
from services.inference.triton.serving import Servable
from services.reward.inference import OUTPUTS, RewardInference
from services.reward.settings import RewardSettings, model_uris
from services.weights.uri import ResolvedModel


def configure(settings: RewardSettings, found: Mapping[str, ResolvedModel]) -> Any:
    """See `Servable.configure`."""
    return write_config(REWARD.model, INPUTS, OUTPUTS, settings.max_batch_size, decoupled=False)


async def load(settings: RewardSettings, found: Mapping[str, ResolvedModel]) -> LoadedModel:
    """See `Servable.load`."""
    from services.reward import model
    from services.reward.servicer import RewardServicer

    loaded = model.load(settings, found)
    return LoadedModel(
        model=RewardInference(RewardServicer(loaded, settings)),
        close=loaded.batcher.close,
        watch=loaded.batcher.watch,
    )


SERVABLE: Final = Servable(
    entry=REWARD, settings=RewardSettings, uris=model_uris, configure=configure, load=load
)
open_model = SERVABLE.open
