"""Settings of the reward service."""

from dataclasses import replace

from services.catalogue import EMBEDDED_CLAP, REWARD
from services.runtime.settings import BatchedSettings, ModelText
from services.weights.uri import ModelURI, ResolvedModel, naming, parse_uris, resolve

FAMILY, MEMBER = "mini", "reward"
"""In this service the name of the embedded family means this member."""
CLAP = "clap"
"""The CLAP model among the weights of the service."""


class RewardSettings(BatchedSettings):
    """Settings of the reward service."""

    listen: str = REWARD.listen
    model: ModelText
    """Reward model to serve, best with a pin; mini means mini:reward. No default: a service never falls back
    to other weights by itself."""
    clap: ModelText = EMBEDDED_CLAP
    """CLAP model that the reward model was trained on; it refuses another."""


def model_uris(settings: RewardSettings) -> dict[str, ModelURI]:
    """Return the URIs of the reward model and of its CLAP model. Raises `InvalidInputError`."""
    uris = parse_uris({"model": settings.model, "clap": settings.clap})
    model = uris["model"]
    if settings.model.partition("#")[0] == FAMILY:
        model = replace(model, path=MEMBER)
    return {REWARD.model: model, CLAP: uris["clap"]}


def find_models(settings: RewardSettings) -> dict[str, ResolvedModel]:
    """Resolve the models, by their names in `model_uris`. Raises `ModelError`."""
    uris = model_uris(settings)
    found = {REWARD.model: resolve(uris[REWARD.model])}
    with naming(CLAP):
        return found | {CLAP: resolve(uris[CLAP])}
