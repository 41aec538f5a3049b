"""A whole promotion, on real processes: a service that switches, challengers beside it, clips by gRPC."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.client import AudioClient
from services.errors import MilongaError, UnauthenticatedError
from services.models.manifest import write_manifest
from services.processes import ServicePlan, free_port, running
from tests.tiny import tiny_pipeline
from training.promotion.errors import GatesRefusedError, RollbackError, RolloutError
from training.promotion.gates.gates import GatesConfig, read_gates
from training.promotion.ledger import EVIDENCE, Ledger
from training.promotion.promote import Parts, Wanted, bootstrap, promote, resume, roll_back
from training.promotion.registry import Registry, Version
from training.promotion.targets.local import LocalTarget
from training.tracking.register import register

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


def test_loopback_is_another_place_on_each_machine(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(address: str) -> str:
        return LocalTarget(address, registry, token=TOKEN).place

    registry = Registry()
    monkeypatch.setattr("socket.gethostname", lambda: "ann")
    same = (
        "127.0.0.1:50051",
        "localhost:50051",
        "[::1]:50051",
        "dns:///LOCALHOST:50051",
        "ipv4:127.0.0.1:50051",
    )
    assert {place(address) for address in same} == {"local/ann:50051"}
    assert place("localhost:1") != place("localhost:2")
    assert place("unix:/run/milonga") == "local/ann/unix:/run/milonga"
    monkeypatch.setattr("socket.gethostname", lambda: "ben")
    assert place("localhost:50051") == "local/ben:50051"
    assert place("gpu-1:50051") == "local/gpu-1:50051"


def test_a_local_service_is_promoted_rolled_back_and_protected(
    service: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    told: list[str] = []
    with pytest.raises(UnauthenticatedError):
        LocalTarget(service, registry, token="wrong").check_reach()
    target = LocalTarget(service, registry, token=TOKEN)
    parts = Parts(target=target, registry=registry, ledger=Ledger(registry), tell=told.append, deadline=600.0)
    assert target.current_pin() is None

    def fail(digest: str) -> None:
        raise RolloutError("it can't be asked")

    before = served(service)
    other = model(tmp_path / "other", 7)
    with monkeypatch.context() as patched:
        patched.setattr(target, "verify", fail)
        with pytest.raises(RollbackError, match="can't be asked") as caught:
            bootstrap(other, parts)
    assert "milonga-tango version 1 now, and what it served before is in no registry" in str(caught.value)
    assert served(service) != before  # it says so
    target.set_pin(f"file:{tmp_path / 'first'}", 60.0)  # as a restart does
    assert "is undone" in resume(parts).line
    assert registry.alias("milonga-tango", "champion") is None

    bootstrap(tmp_path / "first", parts)
    first = registry.version("milonga-tango", "2")
    assert (target.current_pin(), registry.alias("milonga-tango", "champion")) == (first.pin, "2")
    assert registry.alias("milonga-tango", "challenger") is None

    done = register(model(tmp_path / "second", 1))
    second = Version(name=done.name, version=done.version, digest=done.digest)
    promote(Wanted(model="milonga-tango"), gates(tmp_path, -2.0), parts)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (second.digest, "3")
    entry = parts.ledger.entries()[0]
    evidence = parts.ledger.read_text(entry.run_id, EVIDENCE)
    assert '"clips_made": 4' in evidence
    assert [line for line in told if line.startswith("passed  clap.clap-b: difference at least -2, found ")]

    roll_back(parts)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "2")

    told.clear()
    with pytest.raises(GatesRefusedError, match=r"clap.clap-b: difference at least"):
        promote(Wanted(model="milonga-tango", version="3"), gates(tmp_path, 2.0), parts)
    assert "champion: 0 of 4 clips made, the others were there" in told
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "2")

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
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "2")
    assert [e.outcome for e in parts.ledger.entries()] == [
        *("failed", "refused", "rolled back", "promoted", "bootstrapped", "failed")
    ]
    with pytest.raises(MilongaError):
        target.set_pin(f"models:/milonga-tango/{done.version}#{done.digest}", 30.0)
    assert served(service) == first.digest
