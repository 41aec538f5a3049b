"""A whole promotion, on real processes: a service that switches, challengers beside it, clips by gRPC."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.processes import ServicePlan, free_port, running
from services.client import AudioClient
from services.errors import MilongaError, UnauthenticatedError
from services.models.manifest import write_manifest
from tests.tiny import tiny_pipeline
from training.promote import Parts, Wanted, bootstrap, promote, roll_back
from training.promotion.errors import GatesRefusedError, RolloutError
from training.promotion.gates import GatesConfig, read_gates
from training.promotion.ledger import EVIDENCE, Ledger
from training.promotion.local_target import LocalTarget
from training.promotion.registry import Registry, Version
from training.register import register

TOKEN = "only-operators-know"
PROMPTS = ("a dog barks", "a siren wails then rain falls", "a bell rings", "a cat sings before a dog barks")
GATES = """
independent = ["clap-b"]
in_flight = 2
[evaluation]
recipe = "smoke"
prompts = "prompts.csv"
scorers = ["clap-b=mini:clap-b"]
embedders = []
reward = "none"
judge = "none"
[evaluation.sampling]
num_inference_steps = 2
[[gate]]
metric = "clap"
scorer = "clap-b"
minimum_difference = {minimum}
[[gate]]
metric = "silent"
maximum = 1.0
[[gate]]
metric = "latency"
maximum_ratio = 1000.0
"""


def model(folder: Path, seed: int) -> Path:
    tiny_pipeline(seed).save_pretrained(folder)
    write_manifest(folder, name="tiny", version=str(seed), license="Apache-2.0")
    return folder


def gates(folder: Path, minimum: float) -> GatesConfig:
    with (folder / "prompts.csv").open("w") as file:
        csv.writer(file).writerows([["prompt"], *([prompt] for prompt in PROMPTS)])
    (folder / "gates.toml").write_text(GATES.format(minimum=minimum))
    return read_gates(folder / "gates.toml")


@pytest.fixture
def service(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MILONGA_OPERATOR_TOKEN", TOKEN)
    monkeypatch.setenv("MILONGA_THREADS", "1")
    folder = model(tmp_path / "first", 0)
    plan = ServicePlan(
        name="generation", arguments=("--model", f"file:{folder}"), address=f"127.0.0.1:{free_port()}"
    )
    with running([plan], logs=tmp_path) as (process,):
        process.wait_until_serving(600.0)  # torch takes its time to import on a busy machine
        yield process.target


def served(address: str) -> str:
    with AudioClient(address) as client:
        return client.generate("a dog barks", num_inference_steps=1, seed=1).model.digest


def test_a_local_service_is_promoted_rolled_back_and_protected(
    service: str, store: str, tmp_path: Path
) -> None:
    registry = Registry()
    told: list[str] = []
    with pytest.raises(UnauthenticatedError):
        LocalTarget(service, registry, token="wrong").roll_out("mini", 30.0)
    target = LocalTarget(service, registry, token=TOKEN)
    parts = Parts(target=target, registry=registry, ledger=Ledger(registry), tell=told.append, deadline=600.0)
    assert target.current_pin() is None

    done = register(tmp_path / "first")
    first = Version(name=done.name, version=done.version, digest=done.digest)
    bootstrap(first, parts)
    assert (target.current_pin(), registry.alias("milonga-tango", "champion")) == (first.pin, "1")

    done = register(model(tmp_path / "second", 1))
    second = Version(name=done.name, version=done.version, digest=done.digest)
    promote(Wanted(model="milonga-tango"), gates(tmp_path, -2.0), parts)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (second.digest, "2")
    entry = parts.ledger.entries()[0]
    evidence = parts.ledger.read_text(entry.run_id, EVIDENCE)
    assert '"clips_made": 4' in evidence
    assert [line for line in told if line.startswith("passed  clap.clap-b: difference at least -2, found ")]

    roll_back(parts)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "1")

    told.clear()
    with pytest.raises(GatesRefusedError, match=r"clap.clap-b: difference at least"):
        promote(Wanted(model="milonga-tango", version="2"), gates(tmp_path, 2.0), parts)
    assert "champion: 0 of 4 clips made, the others were there" in told
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "1")

    done = register(model(tmp_path / "third", 2))
    for weights in Path("mlruns").rglob("*.safetensors"):
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(bytes(damaged))
    for folder in (tmp_path / "cache" / "models").iterdir():
        if folder.name == done.digest.removeprefix("sha256:"):
            folder.rename(tmp_path / "away")
    with pytest.raises(RolloutError, match=r"the challenger does not come up: .*which it was registered as"):
        promote(Wanted(model="milonga-tango", version=done.version), gates(tmp_path, -2.0), parts)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "1")
    assert [e.outcome for e in parts.ledger.entries()] == [
        *("failed", "refused", "rolled back", "promoted", "bootstrapped")
    ]
    with pytest.raises(MilongaError):
        target.roll_out(f"models:/milonga-tango/{done.version}#{done.digest}", 30.0)
    assert served(service) == first.digest
