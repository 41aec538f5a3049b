"""A local promotion on real processes: a service that switches, challengers, clips by gRPC."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.client import AudioClient
from services.errors import MilongaError, UnauthenticatedError
from services.models import manifest
from services.models.manifest import write_manifest
from services.processes import ServicePlan, free_port, running
from services.weights.uri import resolve
from tests.tiny import tiny_adapter, tiny_pipeline
from training.promotion.errors import GatesRefusedError, RollbackError, RolloutError
from training.promotion.gates.gates import GatesConfig, read_gates
from training.promotion.ledger import EVIDENCE, Ledger
from training.promotion.promote import Promoter, bootstrap, promote, resume, roll_back
from training.promotion.registry import Registry
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


RECORD = """
import os
from services.models import manifest
hash_files = manifest.hash_files

def recorded(folder):
    with open(os.environ["HASHED_FOLDERS"], "a") as file:
        print(os.getpid(), folder.resolve(), file=file)
    return hash_files(folder)

manifest.hash_files = recorded
"""


class Hashes:
    """Records which process hashes which folder, in this process and in those that it starts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = folder / "hashed"
        hooks = folder / "hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(RECORD)
        paths = [str(hooks), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        monkeypatch.setenv("HASHED_FOLDERS", str(self._file))
        monkeypatch.setattr(manifest, "hash_files", manifest.hash_files)  # restored after the test
        exec(RECORD, {})

    @contextmanager
    def counted(self) -> Iterator[Counter[tuple[int, str]]]:
        """Count the hashes inside the context, by process and name of the folder."""
        self._file.write_text("")
        counts: Counter[tuple[int, str]] = Counter()
        yield counts
        for line in self._file.read_text().splitlines():
            process, _, folder = line.partition(" ")
            counts[int(process), Path(folder).name] += 1


@pytest.fixture
def hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hashes:
    return Hashes(tmp_path, monkeypatch)


def model(folder: Path, seed: int) -> Path:
    tiny_pipeline(seed).save_pretrained(folder)
    write_manifest(folder, name="tiny", version=str(seed), license="Apache-2.0")
    return folder


def adapter(folder: Path, base: str) -> Path:
    """Write an adapter of `model(folder, 0)`, trained from the model URI `base`."""
    tiny_adapter(folder, tiny_pipeline(0))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    write_manifest(folder, name="tiny-adapter", version="1", license="Apache-2.0")
    return folder


def damage(digest: str, cache: Path, away: Path) -> None:
    """Change a bit of all registered weights, and move the cached copy of one version away."""
    for weights in Path("mlruns").rglob("*.safetensors"):
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(bytes(damaged))
    for folder in cache.iterdir():
        if folder.name == digest.removeprefix("sha256:"):
            folder.rename(away)


def gates(folder: Path, minimum: float) -> GatesConfig:
    with (folder / "prompts.csv").open("w") as file:
        csv.writer(file).writerows([["prompt"], *([prompt] for prompt in PROMPTS)])
    (folder / "gates.toml").write_text(GATES.format(minimum=minimum))
    return read_gates(folder / "gates.toml")


@pytest.fixture
def service(store: str, hashes: Hashes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
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
    service: str, store: str, hashes: Hashes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    reported: list[str] = []
    with pytest.raises(UnauthenticatedError):
        LocalTarget(service, registry, token="wrong").check_reach()
    target = LocalTarget(service, registry, token=TOKEN)
    promoter = Promoter(
        target=target, registry=registry, ledger=Ledger(registry), report=reported.append, deadline=600.0
    )
    assert target.current_pin() is None

    def fail(digest: str) -> None:
        raise RolloutError("no answer")

    before = served(service)
    other = model(tmp_path / "other", 7)
    with monkeypatch.context() as patched:
        patched.setattr(target, "verify", fail)
        with pytest.raises(RollbackError, match="no answer") as caught:
            bootstrap(promoter, resolve(f"file:{other}"))
    assert "milonga-tango version 1 now, and what it served before is in no registry" in str(caught.value)
    assert served(service) != before  # it says so
    target.set_pin(f"file:{tmp_path / 'first'}", 60.0)  # as a restart does
    assert "is undone" in resume(promoter)
    assert registry.alias("milonga-tango", "champion") is None

    with hashes.counted() as counts:
        bootstrap(promoter, resolve(f"file:{tmp_path / 'first'}"))
    assert counts, "the folder, its copy in the cache, and that copy by the service"
    assert set(counts.values()) == {1}
    first = registry.version("milonga-tango", "2")
    assert (target.current_pin(), registry.alias("milonga-tango", "champion")) == (first.uri, "2")
    assert registry.alias("milonga-tango", "challenger") is None

    second, _ = register(model(tmp_path / "second", 1))
    with hashes.counted() as counts:
        promote(promoter, gates(tmp_path, -2.0), model="milonga-tango")
    assert set(counts.values()) == {1}, "no process hashes a folder twice"
    by_folder = Counter(folder for _, folder in counts)
    assert by_folder[second.digest.removeprefix("sha256:")] == 2, "challenger and service"
    assert by_folder[first.digest.removeprefix("sha256:")] == 1, "the challenger that makes its clips"
    assert (served(service), registry.alias("milonga-tango", "champion")) == (second.digest, "3")
    entry = promoter.ledger.entries()[0]
    evidence = promoter.ledger.read_text(entry.run_id, EVIDENCE)
    assert '"clips_made": 4' in evidence
    assert [
        line for line in reported if line.startswith("passed  clap.clap-b: difference at least -2, found ")
    ]

    roll_back(promoter)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "2")

    tuned, _ = register(adapter(tmp_path / "tuned", f"file:{tmp_path / 'first'}#{first.digest}"))
    promote(promoter, gates(tmp_path, -2.0), model="milonga-tango")
    assert (served(service), registry.alias("milonga-tango", "champion")) == (tuned.digest, tuned.version)
    roll_back(promoter)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "2")

    reported.clear()
    with pytest.raises(GatesRefusedError, match=r"clap.clap-b: difference at least"):
        promote(promoter, gates(tmp_path, 2.0), model="milonga-tango", version="3")
    assert "champion: 0 of 4 clips generated, the others were cached" in reported
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "2")

    third, _ = register(model(tmp_path / "third", 2))
    damage(third.digest, tmp_path / "cache" / "models", tmp_path / "away")
    with pytest.raises(RolloutError, match=r"the challenger failed: .*which it was registered as"):
        promote(promoter, gates(tmp_path, -2.0), model="milonga-tango", version=third.version)
    assert (served(service), registry.alias("milonga-tango", "champion")) == (first.digest, "2")
    assert [e.outcome for e in promoter.ledger.entries()] == [
        *("failed", "refused", "rolled back", "promoted", "rolled back", "promoted", "bootstrapped", "failed")
    ]
    with pytest.raises(MilongaError):
        target.set_pin(third.uri, 30.0)
    assert served(service) == first.digest
