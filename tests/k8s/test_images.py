"""The Dockerfiles and the Makefile as texts: what must agree between them does. `make images` builds them."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = [ROOT / "services" / "Dockerfile", ROOT / "training" / "Dockerfile"]
SHARED = re.compile(r"^ARG BASE_IMAGE=.*?^#{20,}$", re.MULTILINE | re.DOTALL)


def test_lower_layers_are_the_same() -> None:
    services, training = (SHARED.search(path.read_text(encoding="utf-8")) for path in DOCKERFILES)
    assert services is not None
    assert training is not None
    assert services[0] == training[0]


def test_uv_is_the_one_that_setup_installs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^UV_VERSION := (\S+)$", makefile, re.MULTILINE)
    assert found is not None
    assert f" uv=={found[1]} " in DOCKERFILES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_final_stage_runs_as_a_number_and_gets_signals_itself(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    # A name would not do: the kubelet can't tell whether it is root (runAsNonRoot).
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    # Not the shell form, whose shell would keep SIGTERM to itself.
    assert [line for line in lines if line.startswith("ENTRYPOINT ")] == ['ENTRYPOINT ["milonga"]']
    assert "STOPSIGNAL SIGTERM" in lines
    assert not any(line.startswith("HEALTHCHECK") for line in lines)


def test_build_context_holds_what_the_wheel_is_built_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        "pyproject.toml",
        "uv.lock",
        project["project"]["readme"],
        *project["project"]["license-files"],
        wheel["hooks"]["custom"]["path"],
        *wheel["hooks"]["custom"]["force-include"],
        *(package.partition("/")[0] for package in wheel["packages"]),
    }
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == needed
    assert "*" in ignore
