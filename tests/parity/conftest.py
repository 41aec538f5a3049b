"""Parity with laion_clap 1.1.7, the package that LAION's checkpoints come from: ``make parity``.

The package pins numpy < 2, so these tests have an environment of their own (``.venv-parity``). The ordinary
``pytest`` leaves this folder out: without the package nothing in it is collected. Nothing is downloaded;
weights are random, at the real architecture's full size, so 4 GB of memory are needed and 1 GB of disk.

What was measured is printed at the end; `benchmarks/parity.md` keeps it.
"""

from importlib.metadata import version
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("laion_clap") else ["*"]

MEASURED: pytest.StashKey[list[tuple[str, str, float]]] = pytest.StashKey()
"""Model, what was compared, largest absolute difference."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(MEASURED, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the differences and the versions, as rows of a table."""
    measured = config.stash.get(MEASURED, [])
    if not measured:
        return
    packages = ("laion-clap", "torch", "transformers", "numpy", "torchlibrosa", "librosa")
    terminalreporter.section("parity with laion_clap")
    terminalreporter.line(", ".join(f"{name} {version(name)}" for name in packages))
    for model, compared, difference in measured:
        terminalreporter.line(f"| {model} | {compared} | {difference:.1e} |")
