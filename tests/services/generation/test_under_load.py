"""A client at constant load, its retries off: through switches of models, and a drain of a replica."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.load import Call, Load, LoadPlan, References, easy, plot, read_calls, summarize, write_results
from services.client import AudioClient
from services.engine import Engine, EngineConfig
from services.models.manifest import verify_manifest, write_manifest
from services.models.mini import mini_folder
from services.models.tango.loading import load_tango
from services.processes import ServicePlan, ServiceProcess, free_port, running
from tests.programs import environment
from tests.services.generation.serving import serving
from tests.tiny import tiny_pipeline

TOKEN = "of-the-operator"
READY_SECONDS = 600.0
"""Other tests, or somebody's training, may take the processor."""


@contextmanager
def _services(*models: str, **settings: str) -> Iterator[list[ServiceProcess]]:
    """Generation services in processes of their own, ready."""
    plans = [
        ServicePlan(name="generation", arguments=("--model", model), address=f"127.0.0.1:{free_port()}")
        for model in models
    ]
    with running(plans, environment=environment(MILONGA_LOG_LEVEL="warning", **settings)) as services:
        for service in services:
            service.wait_until_serving(READY_SECONDS)
        yield services


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny models."""
    root = tmp_path_factory.mktemp("models")
    for seed in range(2):
        tiny_pipeline(seed=seed).save_pretrained(root / f"tiny-{seed}")
        write_manifest(root / f"tiny-{seed}", name=f"tiny-{seed}", version="1", license="Apache-2.0")
    return [root / "tiny-0", root / "tiny-1"]


def test_switching_models_costs_no_call_and_mixes_none(tmp_path: Path) -> None:
    digests = {name: verify_manifest(mini_folder(name)).digest for name in ("mini-base", "mini")}
    with _services("mini-base", MILONGA_OPERATOR_TOKEN=TOKEN) as (service,):
        plan = easy(service.target, LoadPlan(timeout=120))
        with Load(service.target, plan, tmp_path) as load, AudioClient(service.target, retries=0) as client:
            load.wait_for_answers(6, digests["mini-base"])
            for model in ("mini", "mini-base"):
                load.mark(f"switch to {model}")
                assert client.switch_model(model, token=TOKEN).current.digest == digests[model]
                load.wait_for_answers(6, digests[model])
    summary = write_results(load, tmp_path)
    assert (summary["failed"], summary["mixed"]) == ({}, 0)
    assert summary["calls"] == summary["answered"] >= 18
    assert set(summary["models"]) == set(digests.values())
    assert len(read_calls(tmp_path / "calls.jsonl")) == summary["calls"]
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_a_replica_that_drains_costs_no_call(folders: list[Path], tmp_path: Path) -> None:
    settings = {"MILONGA_DRAIN_DELAY_SECONDS": "3", "MILONGA_GRACE_SECONDS": "60"}
    digests = [verify_manifest(folder).digest for folder in folders]
    with _services(*(f"file:{folder}" for folder in folders), **settings) as (stays, leaves):
        plan = easy(stays.target, LoadPlan(timeout=120, health_check=True))
        with Load(f"ipv4:{stays.target},{leaves.target}", plan, tmp_path) as load:
            load.wait_for_answers(3, digests[1])
            load.mark("SIGTERM")
            leaves.send(signal.SIGTERM)
            assert leaves.process.wait(120) == 0
            load.mark("gone")
            load.wait_for_answers(5, digests[0])
    summary = load.summary()
    assert (summary["failed"], summary["mixed"]) == ({}, 0)
    gone = load.marks[-1][0]
    assert {call.digest for call in load.calls if call.start > gone} == {digests[0]}


def test_an_answer_of_another_model_than_it_names_shows(folders: list[Path]) -> None:
    references = References()
    for folder, mixed in ((folders[0], False), (folders[0], False), (folders[1], True)):
        with (
            Engine(load_tango(folder), EngineConfig(threads=1)) as engine,
            serving(engine) as served,  # under one name, whatever the model is
            AudioClient(served.target, retries=0) as client,
        ):
            generation = client.generate("rain falls", seed=1, encoding="float32")
            assert references.differs("rain falls", generation) == mixed


def test_failures_are_counted_by_code_and_drawn(tmp_path: Path) -> None:
    with Load(f"127.0.0.1:{free_port()}", LoadPlan(rate=50), tmp_path, limit=5) as load:
        load.join()
    calls = [*load.calls, Call(start=1.5, seconds=0.1, code="OK", digest="sha256:" + "0" * 64, name="a")]
    summary = summarize(calls, [(0.5, "kill")])
    assert summary["failed"] == {"UNAVAILABLE": 5}
    assert (summary["calls"], summary["answered"], summary["mixed"]) == (6, 1, 0)
    plot(calls, [(0.5, "kill")], tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000
