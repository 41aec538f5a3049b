"""`milonga promote` into a real Triton: under load, refused, rolled back, killed and resumed."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.cli import run
from services.errors import InvalidInputError
from services.inference.triton.repository import ModelRepository, open_storage
from services.models.manifest import write_manifest
from services.models.mini import mini_folder
from services.weights.registry import RegisteredVersion, connect
from tests.programs import EXACT
from tests.services.inference.suite import Stream, inputs
from tests.triton.server import Server, running
from training.promotion.errors import GatesRefusedError, RolloutError
from training.promotion.gates.gates import GatesConfig, read_gates
from training.promotion.ledger import EVIDENCE, Ledger
from training.promotion.promote import Promoter, bootstrap, promote, roll_back
from training.promotion.registry import Registry
from training.promotion.targets.triton import CHALLENGER, MODEL, TritonTarget
from training.promotion.targets.triton_client import TritonClient
from training.tracking.register import register

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
duration = 2.56
[[gate]]
metric = "clap"
scorer = "clap-b"
minimum_difference = {minimum}
[[gate]]
metric = "latency"
maximum_ratio = 1000.0
"""
PROMPTS = ("a dog barks", "a siren wails then rain falls", "a bell rings", "a cat sings before a dog barks")
NAME = "milonga-tango"


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A Triton that serves version 1 of a registered model; version 2 is the challenger."""

    server: Server
    repository: ModelRepository
    promoter: Promoter
    reported: list[str]
    versions: dict[str, RegisteredVersion]
    gates: Path

    @property
    def target(self) -> TritonTarget:
        found = self.promoter.target
        assert isinstance(found, TritonTarget)
        return found

    @property
    def alias(self) -> str | None:
        return self.promoter.registry.alias(NAME, "champion")

    def words(self, *command: str) -> list[str]:
        """Arguments of `milonga` for a sub-command of promote, with its own."""
        return [
            *("promote", *command, "--target", f"triton://{self.server.grpc}"),
            *("--repository", self.repository.storage.place),
        ]

    def read_gates(self, minimum: float = -2.0) -> GatesConfig:
        self.gates.write_text(GATES.format(minimum=minimum))
        return read_gates(self.gates)

    def serves(self, version: str) -> None:
        """Assert that nothing but `version` is served, and that nothing is left of a promotion."""
        number, digest = int(version), self.versions[version].digest
        with TritonClient(self.server.grpc, timeout=60.0) as client:
            assert client.version_of_clip(MODEL).digest == digest
            assert client.version_of_clip(MODEL, version).digest == digest
            ready = [n for n, state in client.versions(MODEL).items() if state.name == "READY"]
            assert ready == [number]
            assert {state.name for state in client.versions(CHALLENGER).values()} <= {"UNAVAILABLE"}
        assert self.repository.pinned(MODEL) == (number,)
        assert self.repository.storage.names(CHALLENGER) == []
        assert self.alias == version


def variant(folder: Path, note: str) -> Path:
    """The mini model with another digest: a note among its configs is not the same."""
    shutil.copytree(mini_folder("mini"), folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": note}))
    write_manifest(folder, name="mini", version="2", license="Apache-2.0")
    return folder


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work / 'mlflow.db'}")
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    connect(os.environ["MLFLOW_TRACKING_URI"], create=True)
    versions = {}
    for folder in (mini_folder("mini-base"), mini_folder("mini")):
        version, _ = register(folder)
        versions[version.version] = version
    settings = [word for name, value in EXACT.items() for word in ("--set", f"tango.{name}={value}")]
    place = str(tmp_path / "repository")
    assert run(["triton", "export", "--only", "tango", "--model", f"models:/{NAME}/1", *settings, place]) == 0
    with (tmp_path / "prompts.csv").open("w") as file:
        csv.writer(file).writerows([["prompt"], *([prompt] for prompt in PROMPTS)])
    (tmp_path / "triton").mkdir()
    with running(place, tmp_path / "triton") as server:
        registry, repository = Registry(), ModelRepository(open_storage(place))
        reported: list[str] = []
        target = TritonTarget(server.grpc, repository, registry)
        promoter = Promoter(target=target, registry=registry, ledger=Ledger(registry), report=reported.append)
        gates = tmp_path / "gates.toml"
        world = World(
            server=server,
            repository=repository,
            promoter=promoter,
            reported=reported,
            versions=versions,
            gates=gates,
        )
        world.read_gates()
        yield world


@dataclass(kw_only=True, slots=True)
class Load:
    """What callers who ask all the time were answered."""

    failures: list[str] = field(default_factory=list)
    answers: list[tuple[float, str]] = field(default_factory=list)
    """When a request was answered whole, and by which weights."""

    def digests(self, begin: float = 0.0, end: float = float("inf")) -> set[str]:
        return {digest for at, digest in self.answers if begin <= at <= end}


@contextmanager
def load(address: str, callers: int = 1) -> Iterator[Load]:
    """Callers with a stream each, who ask again as soon as they were answered."""
    made, stop = Load(), threading.Event()

    def call(number: int) -> None:
        stream = Stream(address)
        for count in itertools.count():
            if stop.is_set():
                break
            rows = 1 + (number + count) % 2
            stream.ask(inputs([*PROMPTS[:rows]]), request_id=f"{number}-{count}")
            digests: list[str] = []
            final = False
            while not final:
                result, error = stream.answers.get(timeout=120)
                if error is not None:
                    made.failures.append(str(error))
                    break
                if result.as_numpy("AUDIO") is not None:
                    digests += [one.decode() for one in result.as_numpy("DIGEST")]
                final = result.get_response().parameters["triton_final_response"].bool_param
            if len(digests) == rows and len(set(digests)) == 1:
                made.answers.append((time.monotonic(), digests[0]))
            elif final:
                made.failures.append(f"{rows} rows, clips by {digests}")
        stream.client.stop_stream()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_under_load_a_version_is_promoted_and_rolled_back(world: World) -> None:
    one, two = world.versions["1"].digest, world.versions["2"].digest
    assert "is pinned and served" in bootstrap(world.promoter, world.versions["1"])
    world.serves("1")
    with load(world.server.grpc, callers=3) as made:
        time.sleep(2.0)
        begun = time.monotonic()
        promote(world.promoter, world.read_gates(), model=NAME)
        promoted = time.monotonic()
        world.serves("2")
        time.sleep(2.0)
        rolled_back = time.monotonic()
        roll_back(world.promoter)
        ended = time.monotonic()
        world.serves("1")
        time.sleep(2.0)
    assert made.failures == []
    assert made.digests(end=begun) == {one}
    assert made.digests(promoted, rolled_back) == {two}
    assert made.digests(ended) == {one}
    assert made.digests() == {one, two}
    print(
        f"\n{len(made.answers)} requests under load, none failed; promotion {promoted - begun:.1f} s, "
        f"rollback {ended - rolled_back:.1f} s"
    )
    print("\n".join(world.reported))
    evidence = json.loads(
        world.promoter.ledger.read_text(world.promoter.ledger.entries()[1].run_id, EVIDENCE)
    )
    assert (evidence["champion"]["clips_made"], evidence["challenger"]["clips_made"]) == (4, 4)
    assert evidence["serving"].startswith("triton/")
    assert [entry.outcome for entry in world.promoter.ledger.entries()] == [
        "rolled back",
        "promoted",
        "bootstrapped",
    ]
    assert world.repository.versions(MODEL) == [1, 2]
    # At the start, for the promotion, for the rollback: what serves is not loaded again with another.
    initialized = world.server.log.read_text().count("TRITONBACKEND_ModelInstanceInitialize: tango_0_0 ")
    assert initialized == 3


def test_after_a_refusal_the_old_version_serves(world: World, tmp_path: Path) -> None:
    bootstrap(world.promoter, world.versions["1"])
    third, _ = register(variant(tmp_path / "third", "third"))
    world.target._repository.add(world.target._exported(third.uri, MODEL), 3)
    place = Path(world.repository.storage.place)
    for weights in (place / MODEL / "3").rglob("*.safetensors"):
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(bytes(damaged))
    with load(world.server.grpc) as made:
        with pytest.raises(GatesRefusedError, match=r"clap.clap-b: difference at least"):
            promote(world.promoter, world.read_gates(2.0), model=NAME, version="2")
        world.serves("1")
        # Its challenger is as good as any; what is to be served is not what was judged.
        with pytest.raises(
            RolloutError, match=r"^version 1, 3 of tango can't be served: .*unet/.*; fetch the model again$"
        ):
            promote(world.promoter, world.read_gates(), model=NAME, version="3")
        world.serves("1")
    assert made.failures == []
    assert made.digests() == {world.versions["1"].digest}
    assert [entry.outcome for entry in world.promoter.ledger.entries()][:2] == ["failed", "refused"]
    print("\n".join(world.reported))

    other = TritonTarget(
        world.server.grpc, ModelRepository(open_storage(str(tmp_path / "other"))), world.promoter.registry
    )
    other._repository.add(world.target._exported(world.versions["2"].uri, MODEL), 2)
    with pytest.raises(
        InvalidInputError, match=r"is pinned to version 2 of tango, and the Triton at .* serves 1"
    ):
        other.check_setup(challenger=True)


def test_a_promoter_that_is_killed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    bootstrap(world.promoter, world.versions["1"])
    gates = ["--gates", str(world.gates)]
    with load(world.server.grpc) as made:
        for words, resumed, served in (
            (["run", "--version", "2", *gates], "is completed", "2"),
            (["rollback"], "is undone: milonga-tango version 2 is served", "2"),
        ):
            _kill_when_both_are_pinned(world, words)
            assert run(world.words(*words)) == 5  # left unfinished
            assert "promote resume`" in capsys.readouterr().err
            assert run(world.words("resume")) == 0
            assert resumed in capsys.readouterr().out
            world.serves(served)
    assert made.failures == []
    assert made.digests() == {version.digest for version in world.versions.values()}
    assert run(world.words("rollback")) == 0
    world.serves("1")


def _kill_when_both_are_pinned(world: World, words: list[str]) -> None:
    code = "import sys; from services.cli import run; sys.exit(run(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *world.words(*words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while world.repository.pinned(MODEL) != (1, 2):
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_loading_may_be_restricted_to_operators(world: World, tmp_path: Path) -> None:
    flag = "--grpc-restricted-protocol=model-repository:milonga-operator=sesame"
    (tmp_path / "restricted").mkdir()
    with running(world.repository.storage.place, tmp_path / "restricted", flag) as server:
        bootstrapping = [
            *("promote", "bootstrap", f"models:/{NAME}/1", "--target", f"triton://{server.grpc}"),
            *("--repository", world.repository.storage.place, "--alias", "restricted"),
        ]
        assert run(bootstrapping) == 6
        (tmp_path / "token").write_text("sesame\n")
        assert run([*bootstrapping, "--operator-token-file", str(tmp_path / "token")]) == 0
