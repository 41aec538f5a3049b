"""Our own services through the Open Inference Protocol: the suite that a real Triton has to pass as well."""

import os
from collections.abc import Iterator

import pytest

from services.processes import ServicePlan, free_port, running
from tests.services.inference.suite import *  # noqa: F403  # its tests
from tests.services.inference.suite import SETTINGS, Addresses


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    arguments = {
        "generation": ("--model", "mini"),
        "scoring": ("--scorer", "clap-a=mini:clap-a", "--scorer", "clap-b=mini:clap-b"),
        "reward": ("--model", "mini"),
    }
    plans = [
        ServicePlan(name=name, arguments=given, address=f"127.0.0.1:{free_port()}")
        for name, given in arguments.items()
    ]
    logs = tmp_path_factory.mktemp("logs")
    settings = {f"MILONGA_{name.upper()}": value for name, value in SETTINGS.items()}
    with running(plans, logs=logs, environment={**os.environ, **settings}) as services:
        for service in services:
            service.wait_until_serving()
        generation, scoring, reward = (service.target for service in services)
        yield Addresses(tango=generation, clap=scoring, reward=reward)
