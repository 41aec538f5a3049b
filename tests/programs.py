"""Our programs as processes of their own: their environment, and every service on its embedded models."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.catalogue import CATALOGUE
from services.cli.options import embedded_words
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
    """Addresses of services."""

    targets: Mapping[str, str]
    """By name."""

    @property
    def generation(self) -> str:
        return self.targets["generation"]

    @property
    def scoring(self) -> str:
        return self.targets["scoring"]

    @property
    def reward(self) -> str:
        return self.targets["reward"]

    @property
    def captioning(self) -> str:
        return self.targets["captioning"]

    @property
    def explanation(self) -> str:
        return self.targets["explanation"]

    @property
    def by_model(self) -> dict[str, str]:
        """By the model's name in the Open Inference Protocol."""
        return {CATALOGUE[name].model: target for name, target in self.targets.items()}


@contextmanager
def all_services(logs: Path) -> Iterator[Services]:
    """Start every service on its embedded models, and wait until they answer."""
    plans = [
        ServicePlan(
            name=entry.name,
            arguments=embedded_words(entry),
            address=f"127.0.0.1:{free_port()}",
        )
        for entry in CATALOGUE.values()
    ]
    settings = {f"MILONGA_{name.upper()}": value for name, value in EXACT.items()}
    with running(plans, logs=logs, environment=environment(**settings)) as started:
        for service in started:
            service.wait_until_serving()
        yield Services(targets={service.plan.name: service.target for service in started})
