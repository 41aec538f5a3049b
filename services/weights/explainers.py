"""Load the explainer of a resolved generator."""

from services.api.explanation import Explainer
from services.errors import invalid
from services.models.architectures import architecture_of
from services.models.audiogen.explainer import AudioGenExplainer
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.explaining.explainer import DiffusionExplainer
from services.weights.uri import ResolvedModel


def load_explainer(model: ResolvedModel, *, device: str = "auto", dtype: str = "float32") -> Explainer:
    """Load a generator, and return its explainer; takes seconds.

    Args:
        model: the generator.
        device: torch's name of a device, or ``auto``.
        dtype: float type of text encoder and denoiser.

    Raises:
        ModelError: the model was refused.
        InvalidInputError: the device does not exist, or the model is a distilled one.
    """
    architecture = architecture_of(model.folder)
    if architecture.folds_guidance(model.folder):
        raise invalid(
            "model", f"{model.identity.name} is a distilled model; give the one it was distilled from"
        )
    pipeline = architecture.load(model.folder, device=device, dtype=dtype)
    if isinstance(pipeline, AudioGenPipeline):
        return AudioGenExplainer(pipeline)
    return DiffusionExplainer(pipeline, architecture)
