"""Settings of the captioning service."""

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from services.catalogue import CAPTIONING, captioner_uri
from services.runtime.settings import BatchedSettings, ModelText
from services.weights.uri import ModelURI, ResolvedModel, naming, parse_uris, resolve

CLAP: Final = "clap"
"""Key of the CLAP model among the service's models, and its name as a scorer."""


class CaptioningSettings(BatchedSettings):
    """Settings of the captioning service."""

    listen: str = CAPTIONING.listen
    model: ModelText
    """Captioner to serve, preferably pinned to a digest; mini means mini:captioner. No default: a service
    never falls back to other weights by itself."""
    clap: ModelText = ""
    """CLAP model that chooses among the candidates (CLAP-Refine), in this process. Default: none."""
    scoring: str | None = None
    """Address of a scoring service that chooses, instead of `clap`. It gets the token in the file that
    MILONGA_TOKEN_FILE names."""
    scoring_scorer: str | None = None
    """The scoring service's scorer that chooses. Default: its first."""
    scoring_ca_file: Path | None = None
    """CA certificates (PEM) to verify the scoring service's certificate. Default: it is reached without
    TLS."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the language model; encoder and projector stay in float32."""
    max_batch_seconds: float = Field(default=40.0, gt=0, le=86_400)
    """Maximum seconds of audio in one batch of the model. Bounds its memory. A clip counts with what the
    model reads of it, in proportion to its beams: with the model's default numbers once."""

    @model_validator(mode="after")
    def _check_refinement(self) -> Self:
        if self.clap and self.scoring is not None:
            raise ValueError("clap and scoring are both given; give one of them, or none")
        if self.scoring is None and (self.scoring_scorer is not None or self.scoring_ca_file is not None):
            raise ValueError("scoring_scorer and scoring_ca_file are for a scoring service; give scoring too")
        return self


def model_uris(settings: CaptioningSettings) -> dict[str, ModelURI]:
    """Return the URIs of the captioner (key: ``CAPTIONING.model``) and of the CLAP model, if any (`CLAP`).

    Raises:
        InvalidInputError: a URI is invalid; lists every violation.
    """
    texts = {"model": captioner_uri(settings.model)} | ({"clap": settings.clap} if settings.clap else {})
    uris = parse_uris(texts)
    return {CAPTIONING.model if name == "model" else name: uri for name, uri in uris.items()}


def find_models(settings: CaptioningSettings) -> dict[str, ResolvedModel]:
    """Resolve the models of `model_uris`, under the same keys. Raises `ModelError`."""
    uris = model_uris(settings)
    found = {CAPTIONING.model: resolve(uris[CAPTIONING.model])}
    with naming(CLAP):
        return found | ({CLAP: resolve(uris[CLAP])} if CLAP in uris else {})
