"""How often a run hashes each model folder, and how often it resolves a URI."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from services.models.manifest import hash_each
from services.weights.uri import ModelURI, resolve

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted, in this process."""

    hashed: Counter[Path] = field(default_factory=Counter)
    """Times, by folder."""
    resolved: Counter[ModelURI] = field(default_factory=Counter)
    """Times, by URI."""
    size: list[int] = field(default_factory=list)
    """Bytes of each folder that was hashed, one entry a time."""


@contextmanager
def counting() -> Iterator[Counts]:
    """Count until the end of the context."""
    counts = Counts()

    def count_hash(folder: Path, files: Iterable[Path]) -> None:
        counts.hashed[folder.resolve()] += 1
        counts.size.append(sum(path.stat().st_size for path in files))

    def count_resolve(uri: str | ModelURI, *_: object, **__: object) -> None:
        counts.resolved[ModelURI.parse(uri) if isinstance(uri, str) else uri] += 1

    with _before(hash_each, count_hash), _before(resolve, count_resolve):
        yield counts


@contextmanager
def _before(function: Callable[P, R], action: Callable[P, None]) -> Iterator[None]:
    """Call `action` before each call of `function`, under every name that a module has imported it by."""

    @wraps(function)
    def both(*args: P.args, **kwargs: P.kwargs) -> R:
        action(*args, **kwargs)
        return function(*args, **kwargs)

    named = [
        (module, name)
        for module in list(sys.modules.values())
        for name, value in list(vars(module).items())
        if value is function
    ]
    for module, name in named:
        setattr(module, name, both)
    try:
        yield
    finally:
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items()):
                if value is both:
                    setattr(module, name, function)
