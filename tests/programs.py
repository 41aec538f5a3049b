"""Our programs as processes of their own: their environment, and the three services on embedded models."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.processes import ServicePlan, free_port, running

EXACT = {"exact": "true", "batch_shapes": "[2]", "threads": "1"}
"""Settings of generation: calls of one shape, so that equal means bit for bit."""


def environment(**settings: str) -> dict[str, str]:
    """The environment of a program: of our settings only `settings`, one thread, logs in JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MILONGA_")}
    paths = os.pathsep.join(path for path in sys.path if path)
    ours = {"PYTHONPATH": paths, "MILONGA_THREADS": "1", "MILONGA_LOG_FORMAT": "json"}
    return {**kept, **ours, **settings}


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """Addresses."""

    generation: str
    scoring: str
    reward: str


@contextmanager
def all_services(logs: Path) -> Iterator[Services]:
    """Start the services on the embedded models, and wait until they answer."""
    arguments = {
        "generation": ("--model", "mini"),
        "scoring": ("--scorer", "clap-a=mini:clap-a", "--scorer", "clap-b=mini:clap-b"),
        "reward": ("--model", "mini"),
    }
    plans = [
        ServicePlan(name=name, arguments=given, address=f"127.0.0.1:{free_port()}")
        for name, given in arguments.items()
    ]
    settings = {f"MILONGA_{name.upper()}": value for name, value in EXACT.items()}
    with running(plans, logs=logs, environment=environment(**settings)) as started:
        for service in started:
            service.wait_until_serving()
        yield Services(**{service.plan.name: service.target for service in started})
