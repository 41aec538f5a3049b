"""Load resolved CLAP and reward models.

Each backend is imported only when it is used, since it may not be installed.
"""

from services.errors import invalid
from services.models.clap.model import ClapModel, EmbeddingModel
from services.weights.uri import ResolvedModel


def load_embedding_model(model: ResolvedModel, device: str = "auto") -> EmbeddingModel:
    """Load a CLAP model with the backend of its URI's scheme.

    Raises:
        ModelError: the weights were refused.
        InvalidInputError: the device does not exist.
    """
    if model.reader == "laion-clap":
        from services.models.clap.laion_package import load_laion_clap

        return load_laion_clap(model.folder, device)
    return load_clap_model(model, device)


def load_clap_model(model: ResolvedModel, device: str = "auto") -> ClapModel:
    """Load a CLAP model that returns tokens, which reward models need.

    Raises:
        ModelError: the weights were refused.
        InvalidInputError: the device does not exist, or the URI is ``laion-clap:``, which returns no tokens.
    """
    match model.reader:
        case "laion":
            from services.models.clap.laion import load_laion

            return load_laion(model.folder, device=device)
        case "laion-clap":
            text = f"is laion-clap:{model.folder}, which returns no tokens, only embeddings; give laion:PATH"
            raise invalid("clap", text)
        case _:
            from services.models.clap.loading import load_clap

            return load_clap(model.folder, device=device)
