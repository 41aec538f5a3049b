"""The callers of a soak run, their tokens, and the file that services read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from services.runtime.callers import PRIORITY_KEY, Priority, Role
from services.runtime.tokens import new_token, token_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """A caller with a token, or without."""

    name: str
    roles: tuple[Role, ...] = ("caller",)
    priority: Priority = "interactive"
    calls_per_minute: int | None = None
    token: str | None = field(default_factory=new_token, repr=False)

    def metadata(self, request_id: str) -> list[tuple[str, str]]:
        """Return the metadata of a call."""
        found = [("x-request-id", request_id), (PRIORITY_KEY, self.priority)]
        return [*found, ("authorization", f"Bearer {self.token}")] if self.token is not None else found

    def table(self) -> str:
        """Return its table for the file of callers."""
        assert self.token is not None
        quota = f"calls_per_minute = {self.calls_per_minute}\n" if self.calls_per_minute else ""
        roles = ", ".join(f'"{role}"' for role in self.roles)
        return f'[callers.{self.name}]\nroles = [{roles}]\ntokens = ["{token_digest(self.token)}"]\n{quota}'


STUDIO: Final = Caller(name="studio")
FARM: Final = Caller(name="farm", roles=("batch",), priority="batch")
HURRIED: Final = Caller(name="hurried", calls_per_minute=20)
"""Uses up its quota."""
WATCHER: Final = Caller(name="watcher", roles=("observer",))
OPERATOR: Final = Caller(name="operator", roles=("operator",))
STRANGER: Final = Caller(name="stranger", token=None)
KNOWN: Final[Mapping[str, Caller]] = MappingProxyType(
    {caller.name: caller for caller in (STUDIO, FARM, HURRIED, WATCHER, OPERATOR)}
)


def write_callers(path: Path) -> None:
    """Write the file of callers."""
    path.write_text("\n".join(caller.table() for caller in KNOWN.values()))
