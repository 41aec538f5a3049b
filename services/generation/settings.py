"""Settings of the generation service."""

from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from services.api.engine import EngineConfig
from services.catalogue import GENERATION
from services.errors import invalid
from services.runtime.settings import ModelText, ServerSettings
from services.weights.uri import ModelURI, served_uri


class GenerationSettings(ServerSettings, EngineConfig):
    """Settings of the generation service: of its server, its model and its engine."""

    model_config = ServerSettings.model_config

    listen: str = GENERATION.listen
    model: ModelText = ""
    """Model to serve, preferably pinned to a digest. Default: no model is pinned, and without
    `unpinned_model` the service does not start: it never falls back to other weights by itself."""
    unpinned_model: ModelText = ""
    """Model to serve while `model` is empty: for a first start, never in production."""
    device: str = "auto"
    """auto (cuda if there is one, otherwise cpu), cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of text encoder and denoiser; autoencoder and vocoder stay in float32."""
    operator_token_file: Path | None = None
    """File with a token; its bearer may switch models while calls are served (OperatorService). Default:
    no operator, and no OperatorService."""
    operator_token: SecretStr | None = None
    """The token itself, if there is no file: from the environment, since others can list options."""


def model_uris(settings: GenerationSettings) -> dict[str, ModelURI]:
    """Return the URI of the model. Raises `InvalidInputError` if it is no model URI, or is empty."""
    return {GENERATION.model: served_uri(settings.model, settings.unpinned_model)}


def read_operator_token(settings: GenerationSettings) -> str | None:
    """Return the operator's token; None if there is none, and so no OperatorService.

    Raises:
        InvalidInputError: the file can't be read, or holds no token.
    """
    field, token = "operator_token", settings.operator_token
    text = "" if token is None else token.get_secret_value()
    if settings.operator_token_file is not None:
        field, path = "operator_token_file", settings.operator_token_file
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise invalid(field, f"is {path}, which can't be read: {reason}") from error
    elif not text:
        return None
    text = text.strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise invalid(field, "holds no token: give one line of printable ASCII without spaces")
    return text
