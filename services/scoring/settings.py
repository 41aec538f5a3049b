"""Settings of the scoring service."""

import re

from pydantic import Field, field_validator

from services.catalogue import SCORING
from services.runtime.settings import BatchedSettings, ModelText
from services.weights.uri import ModelURI, ResolvedModel, naming, parse_uris, resolve

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ScoringSettings(BatchedSettings):
    """Settings of the scoring service."""

    listen: str = SCORING.listen
    scorers: dict[str, ModelText] = Field(default={}, validate_default=True)
    """Names of scorers with their CLAP models, preferably pinned to a digest. No default: a service never
    falls back to other weights by itself."""

    @field_validator("scorers")
    @classmethod
    def _check_scorers(cls, scorers: dict[str, str]) -> dict[str, str]:
        if not scorers:
            raise ValueError(
                'give at least one: --scorer NAME=URI, or MILONGA_SCORERS=\'{"a": "mini:clap-a"}\''
            )
        for name in scorers:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"the name {name[:80]!r} must be 1 to 64 letters, digits, underscores, dots and hyphens"
                )
        return scorers


def model_uris(settings: ScoringSettings) -> dict[str, ModelURI]:
    """Return the URI of each scorer's model. Raises `InvalidInputError` that lists every invalid URI."""
    return parse_uris(settings.scorers, field="scorers.{}")


def find_models(settings: ScoringSettings) -> dict[str, ResolvedModel]:
    """Resolve the CLAP model of each scorer. Raises `ModelError` whose message begins with the scorer."""
    found = {}
    for name, uri in model_uris(settings).items():
        with naming(f"scorer {name}"):
            found[name] = resolve(uri)
    return found
