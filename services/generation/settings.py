"""Settings of the generation service."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator

from services.api.engine import EngineConfig
from services.catalogue import GENERATION
from services.runtime.settings import ModelText, ServerSettings
from services.runtime.tokens import check_token, read_token
from services.weights.adapter_sources import AdapterSources
from services.weights.uri import ModelURI, parse_uris, served_uri

_OPERATOR_URI = re.compile(r"mini|models:(/[\w .-]*)?|hf:[\w./-]*|file:/[^\x00-\x1f\x7f]*")


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
    offload: bool = False
    """Whether the text encoder, and Tango's autoencoder and vocoder, stay in main memory, and each of their
    layers is copied to the device when it runs: less memory of the device, slower new prompts and decodes."""
    watermark: Path | None = None
    """AudioSeal's generator_base.pth: every clip is marked with the first 16 bits of its model's digest. It
    needs the extra watermark."""
    adapters: dict[str, ModelText] = Field(default={})
    """Names of low-rank adapters that requests may use, with their URIs. All are loaded at the start."""
    registry_adapters: bool = False
    """Whether requests may also use any adapter of MLflow's registry, as NAME@VERSION or NAME@ALIAS."""
    adapter_memory_mib: int = Field(default=512, gt=0, le=1_000_000)
    """Memory of adapters in MiB. Beyond it, the least recently used ones are dropped, and loaded again when
    they are asked for."""
    operator_token_file: Path | None = None
    """File with a token; its bearer may switch models while calls are served (OperatorService). Default:
    no operator, and no OperatorService."""
    operator_uris: tuple[str, ...] = ("mini", "models:", "hf:", "file:/")
    """Models that an operator may switch to: mini, or beginnings of model URIs, such as models:/milonga-tango
    or file:/models. The path of a file: URI lies below one of these folders, with links resolved."""
    switch_timeout_seconds: float = Field(default=1800.0, gt=0, le=86_400)
    """Maximum time of a switch, fetching the model included."""
    operator_token: SecretStr | None = None
    """The token itself, if there is no file: from the environment, since others can list options."""

    @field_validator("operator_uris")
    @classmethod
    def _check_operator_uris(cls, uris: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [uri for uri in uris if not _OPERATOR_URI.fullmatch(uri)]
        if wrong:
            raise ValueError(
                f"{wrong[0][:80]!r} must be mini, models:, models:/NAME, hf:, hf:OWNER or file:/FOLDER"
            )
        return uris


def adapter_sources(settings: GenerationSettings) -> AdapterSources:
    """Return the adapters that requests may use. Raises `InvalidInputError` that lists every invalid URI."""
    parse_uris(settings.adapters, field="adapters.{}")
    return AdapterSources(
        listed=settings.adapters,
        registry=settings.registry_adapters,
        max_bytes=settings.adapter_memory_mib * 2**20,
    )


def model_uris(settings: GenerationSettings) -> dict[str, ModelURI]:
    """Return the URI of the model. Raises `InvalidInputError` if it is no model URI, or is empty."""
    return {GENERATION.model: served_uri(settings.model, settings.unpinned_model)}


def read_operator_token(settings: GenerationSettings) -> str | None:
    """Return the operator's token; None if there is none, and so no OperatorService.

    Raises:
        InvalidInputError: the file can't be read, or holds no token.
    """
    if settings.operator_token_file is not None:
        return read_token("operator_token_file", settings.operator_token_file)
    text = "" if settings.operator_token is None else settings.operator_token.get_secret_value()
    return check_token("operator_token", text) if text else None
