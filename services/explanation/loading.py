"""Load the model of the explanation service."""

from collections.abc import Mapping

from services.catalogue import EXPLANATION
from services.explanation.settings import ExplanationSettings
from services.explanation.worker import ExplanationWorker
from services.weights.explainers import load_explainer
from services.weights.uri import ResolvedModel


def load(settings: ExplanationSettings, found: Mapping[str, ResolvedModel]) -> ExplanationWorker:
    """Load the explainer.

    Args:
        settings: the service's settings.
        found: the resolved generator, keyed as `model_uris` keys it.

    Raises:
        ModelError: the model was refused.
        InvalidInputError: the device does not exist.
    """
    model = found[EXPLANATION.model]
    explainer = load_explainer(model, device=settings.device, dtype=settings.dtype)
    return ExplanationWorker(explainer, model.identity, model.folder, settings)
