"""The file of callers: names, hashed tokens, certificate identities, roles and quotas, in TOML.

::

    [callers.studio]
    roles = ["caller"]
    tokens = ["sha256:9f86d0…"]                   # printed by `milonga token`; two while one is replaced
    identities = ["spiffe://example.org/studio"]  # names in client certificates (mTLS)
    calls_per_minute = 600
    work_per_minute = 100_000
"""

import hmac
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.errors import FieldViolation, InvalidInputError, invalid
from services.runtime.callers import NAME, Role
from services.runtime.quotas import Quota, Usage

FIELD: Final = "callers_file"
_DIGEST = r"^sha256:[0-9a-f]{64}$"
_SHOWN = 5
"""Faults of a file that an error shows; further ones are counted."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CallerEntry(_Model):
    """One caller in the file."""

    roles: tuple[Role, ...] = Field(default=("caller",), min_length=1)
    """Roles; `services.runtime.roles` has the methods of each."""
    tokens: tuple[Annotated[str, Field(pattern=_DIGEST)], ...] = Field(default=(), max_length=2)
    """Digests of its valid tokens: two while one is being replaced."""
    identities: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names in its certificates: a DNS name or URI of the subject's alternative names, or the common name of
    a certificate without any."""
    calls_per_minute: float | None = Field(default=None, ge=0.001, le=1e12)
    work_per_minute: float | None = Field(default=None, ge=0.001, le=1e12)

    @property
    def quota(self) -> Quota:
        """Its quota."""
        return Quota(calls_per_minute=self.calls_per_minute, work_per_minute=self.work_per_minute)


class _File(_Model):
    callers: dict[str, CallerEntry] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A known caller."""

    roles: frozenset[Role]
    usage: Usage


class CallerTable:
    """The callers of one version of the file."""

    def __init__(self, entries: Mapping[str, CallerEntry], before: "CallerTable | None" = None) -> None:
        """Index the entries. Callers whose quota is as it was `before` keep what they have used of it."""
        self._known: dict[str, Known] = {}
        self._tokens: list[tuple[str, Known]] = []
        self._identities: dict[str, Known] = {}
        for name, entry in entries.items():
            old = None if before is None else before._known.get(name)
            kept = old is not None and old.usage.quota == entry.quota
            usage = old.usage if old is not None and kept else Usage(name, entry.quota)
            known = self._known[name] = Known(roles=frozenset(entry.roles), usage=usage)
            self._tokens += [(digest, known) for digest in entry.tokens]
            self._identities |= dict.fromkeys(entry.identities, known)

    def __len__(self) -> int:
        return len(self._known)

    def by_token(self, digest: str) -> Known | None:
        """Return the caller whose token has this digest. Compares with every one, in constant time."""
        found = None
        for expected, known in self._tokens:
            if hmac.compare_digest(expected, digest):
                found = known
        return found

    def by_identities(self, identities: tuple[str, ...]) -> Known | None:
        """Return the caller with the first of a certificate's names that is in the file."""
        return next((self._identities[name] for name in identities if name in self._identities), None)


def read_callers(path: Path, before: CallerTable | None = None) -> CallerTable:
    """Read a file of callers.

    Raises:
        InvalidInputError: the file can't be read or is invalid. Never has a value of `tokens`: somebody may
            have written a token there.
    """
    try:
        text = path.read_text(encoding="utf-8")
        parsed = _File.model_validate(tomllib.loads(text))
    except OSError as error:
        raise invalid(FIELD, f"is {path}, which can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise invalid(FIELD, f"is {path}, which is not text in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise invalid(FIELD, f"is {path}, which is not TOML: {error}") from None
    except ValidationError as error:
        faults = [f"{_key(fault['loc'])} {_describe(fault)}" for fault in error.errors(include_input=True)]
        raise _refusal(path, faults) from None
    faults = list(_faults(parsed.callers))
    if faults:
        raise _refusal(path, faults)
    return CallerTable(parsed.callers, before)


def _faults(entries: Mapping[str, CallerEntry]) -> list[str]:
    """Describe what is wrong between entries: names, and tokens or identities that two have."""
    faults = [
        f"callers.{name!r} is no name: letters, digits, dot, dash and underscore, at most 64"
        for name in entries
        if not re.fullmatch(NAME, name)
    ]
    for what in ("tokens", "identities"):
        owners: dict[str, str] = {}
        for name, entry in entries.items():
            for value in getattr(entry, what):
                if value in owners:
                    faults.append(f"callers.{name}.{what} has one that callers.{owners[value]} has too")
                owners[value] = name
    return faults


def _key(location: tuple[int | str, ...]) -> str:
    text = ".".join(f"[{part}]" if isinstance(part, int) else part for part in location) or "the file"
    return text.replace(".[", "[")


def _describe(fault: Any) -> str:
    location = fault["loc"]
    if fault["type"] == "extra_forbidden":
        return f"is not known; known are {', '.join(CallerEntry.model_fields)}, in tables [callers.NAME]"
    if "tokens" in location:
        return "must be at most two digests sha256:HEX, as `milonga token` prints them; never a token itself"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"is {str(fault['input'])[:80]!r}: {message[0].lower()}{message[1:]}"


def _refusal(path: Path, faults: list[str]) -> InvalidInputError:
    more = [f"{len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    shown = "; ".join([*faults[:_SHOWN], *more])
    return InvalidInputError(FieldViolation(FIELD, f"is {path}: {shown}"))
