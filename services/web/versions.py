"""Identities of weights as JSON."""

from dataclasses import asdict
from typing import Any

from services.api.model import ModelVersion


def version_of(version: ModelVersion) -> dict[str, Any]:
    """Return the identity of weights."""
    return asdict(version)


def openai_model(version: ModelVersion, kind: str) -> dict[str, Any]:
    """Return an element of OpenAI's list of models, with further fields. `kind` names the service."""
    return {
        "id": version.name,
        "object": "model",
        # OpenAI's clients require a time; weights have none.
        "created": 0,
        "owned_by": "milonga",
        "kind": kind,
        "version": version.version,
        "digest": version.digest,
        "license": version.license,
    }
