"""Which adapters requests may name. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from services.errors import invalid
from services.weights.uri import ModelURI

_REGISTERED: Final = re.compile(r"(?P<name>[\w .-]+)@(?P<version>[\w-]+)")
"""An adapter of the registry: NAME@VERSION or NAME@ALIAS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSources:
    """Which adapters requests may name."""

    listed: Mapping[str, str]
    """Model URIs by name."""
    registry: bool = False
    """Whether NAME@VERSION and NAME@ALIAS of the registry are allowed."""
    any_uri: bool = False
    """Whether any model URI is: for requests of this process's own user."""
    max_bytes: int = 512 * 2**20
    """Memory of the adapters; the least recently used ones are dropped beyond it."""

    def uri_of(self, name: str) -> ModelURI:
        """Return the URI of the adapter that a request names. Raises `InvalidInputError`."""
        if name in self.listed:
            return ModelURI.parse(self.listed[name])
        found = _REGISTERED.fullmatch(name)
        if found is not None and (self.registry or self.any_uri):
            separator = "/" if found["version"].isdigit() else "@"
            return ModelURI.parse(f"models:/{found['name']}{separator}{found['version']}")
        if self.any_uri and ":" in name:
            return ModelURI.parse(name)
        known = [
            *self.listed,
            *(["NAME@VERSION of the registry"] if self.registry or self.any_uri else []),
            *(["a model URI, such as file:PATH"] if self.any_uri else []),
        ]
        remedy = f"must be one of {', '.join(known)}" if known else "and this service has no adapters"
        raise invalid("adapter", f"is {name[:80]!r}, {remedy}")
