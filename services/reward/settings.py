"""Settings of the reward service."""

from services.catalogue import EMBEDDED_CLAP, REWARD, reward_uri
from services.runtime.settings import BatchedSettings, ModelText
from services.weights.uri import ModelURI, ResolvedModel, naming, parse_uris, resolve

CLAP = "clap"
"""Key of the CLAP model among the service's models."""


class RewardSettings(BatchedSettings):
    """Settings of the reward service."""

    listen: str = REWARD.listen
    model: ModelText
    """Reward model to serve, preferably pinned to a digest; mini means mini:reward. No default: a service
    never falls back to other weights by itself."""
    clap: ModelText = EMBEDDED_CLAP
    """CLAP model that the reward model was trained on; any other is refused."""


def model_uris(settings: RewardSettings) -> dict[str, ModelURI]:
    """Return the URIs of the reward model (key: ``REWARD.model``) and of its CLAP model (key: ``CLAP``).

    Raises:
        InvalidInputError: a URI is invalid; lists every violation.
    """
    uris = parse_uris({"model": reward_uri(settings.model), "clap": settings.clap})
    return {REWARD.model: uris["model"], CLAP: uris["clap"]}


def find_models(settings: RewardSettings) -> dict[str, ResolvedModel]:
    """Resolve the models of `model_uris`, under the same keys. Raises `ModelError`."""
    uris = model_uris(settings)
    found = {REWARD.model: resolve(uris[REWARD.model])}
    with naming(CLAP):
        return found | {CLAP: resolve(uris[CLAP])}
