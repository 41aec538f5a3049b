import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from services.errors import InvalidInputError, OutputError, ServiceUnavailableError
from tests.training.tracking.mlflow_server import MLflowServer
from tests.waiting import until
from training.loop.run_folder import Journal
from training.tracking import runs as tracking
from training.tracking.runs import Tracker, sync


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch, starting_server: MLflowServer) -> None:
    monkeypatch.setattr(tracking, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_WAIT", 0.2)


def client_of(uri: str) -> MlflowClient:
    return MlflowClient(uri, uri)


def runs_of(uri: str, experiment: str = "milonga") -> dict[str, Run]:
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def history(uri: str, run: Run, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client_of(uri).get_metric_history(run.info.run_id, name))


def squares(step: int) -> dict[str, float]:
    return {"loss": 1 / (step + 1), "norm": float(step)}


def write_steps(path: Path, steps: Iterable[int], first: int | None = None) -> None:
    """As a loop does that begins at step `first`."""
    with Journal(path, first) as journal:
        for step in steps:
            journal.write({"step": step, **squares(step)})


def test_a_run_with_its_stages_is_in_the_local_database(store: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.csv"
    data.write_text("prompt,chosen\n")
    with Tracker("mini", tmp_path / "t", params={"seed": 3}) as tracker:
        assert tracker.hint == f"mlflow ui --backend-store-uri {store}"
        with tracker.stage("dpo") as stage:
            stage.log_params(
                {f"p{i}": i for i in range(150)} | {"rate": 1e-5, "none": None, "odd, name": "x"}
            )
            stage.follow(tmp_path / "run" / "journal.jsonl")
            (tmp_path / "run").mkdir()
            write_steps(tmp_path / "run" / "journal.jsonl", range(2500))
            stage.log_metrics({"fad": 1.5, "order": {"all": 0.5}, "word": "text", "nan": math.nan})
            stage.log_dataset("pairs", data)
            stage.log_audio("first/a dog", np.zeros(16_000, np.float32), 16_000, "A dog barks")
            stage.log_artifact(data)
    runs = runs_of(store)
    parent, dpo = runs["mini"], runs["dpo"]
    assert (parent.info.run_id, parent.info.status) == (tracker.run_id, "FINISHED")
    assert dpo.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert parent.data.params == {"seed": "3"}
    assert {"mlflow.source.name", "milonga.version", "milonga.run"} <= parent.data.tags.keys()
    assert len(parent.data.tags.get("mlflow.source.git.commit", "0" * 40)) == 40
    assert len(dpo.data.params) == 153
    assert (dpo.data.params["rate"], dpo.data.params["odd_ name"]) == ("1e-05", "x")
    assert history(store, dpo, "loss") == [(step, 1 / (step + 1)) for step in range(2500)]
    assert dpo.data.metrics["order/all"] == 0.5
    assert math.isnan(dpo.data.metrics["nan"])
    assert parent.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert dpo.inputs is not None
    (dataset,) = dpo.inputs.dataset_inputs
    digest = tracking.data_digest(data)
    assert dataset.dataset.name == "pairs"
    assert json.loads(dataset.dataset.profile or "") == {"digest": digest}
    assert dpo.data.tags["milonga.data.pairs"] == digest
    folder = Path.cwd() / "mlruns" / "milonga" / dpo.info.run_id / "artifacts"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"pairs.csv", "samples/first/a dog.png", "samples/first/a dog.wav"}
    assert (folder / "samples/first/a dog.wav").read_bytes()[:4] == b"RIFF"


def test_a_run_is_continued_and_steps_done_twice_are_logged_once(store: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for first, steps in ((0, 7), (5, 10)):
        with Tracker("run", tmp_path / "t", params={"lr": first}) as tracker, tracker.stage("sft") as stage:
            stage.follow(path)
            stage.log_metrics({"fad": 2.0})
            stage.log_params({"lr": first})
            write_steps(path, range(first, steps), first)
    runs = runs_of(store)
    assert set(runs) == {"run", "sft"}
    assert history(store, runs["sft"], "norm") == [(step, float(step)) for step in range(10)]
    assert history(store, runs["sft"], "fad") == [(0, 2.0)]
    assert runs["sft"].data.params == {"lr": "0"}
    assert runs["run"].info.status == "FINISHED"


def test_what_is_sent_again_is_kept_once(store: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Tracker("run", tmp_path / "t") as tracker, tracker.stage("sft") as stage:
        stage.follow(path)
        with Journal(path, 0) as journal:
            journal.write({"step": 0, "loss": 1.0, "nan": math.nan})
            journal.write({"step": 1, "loss": 0.5, "nan": math.nan})
        stage.log_dataset("pairs", path)
        stage.log_bytes("report.json", b"{}")
    before = runs_of(store)
    assert sync(tmp_path / "t") == 0
    (tmp_path / "t" / "sent.json").unlink()  # as if killed between sending and marking
    assert sync(tmp_path / "t") == 1
    runs = runs_of(store)
    assert {name: run.info.run_id for name, run in runs.items()} == {
        name: run.info.run_id for name, run in before.items()
    }
    assert history(store, runs["sft"], "loss") == [(0, 1.0), (1, 0.5)]
    assert len(history(store, runs["sft"], "nan")) == 2
    assert runs["sft"].inputs is not None
    assert len(runs["sft"].inputs.dataset_inputs) == 1


def test_another_server_gets_everything(store: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Tracker("run", tmp_path / "t") as tracker, tracker.stage("sft") as stage:
        stage.follow(path)
        write_steps(path, range(3), 0)
        stage.log_bytes("report.json", b"{}")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert sync(tmp_path / "t", uri=other) > 8
    sft = runs_of(other)["sft"]
    assert history(other, sft, "norm") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert [file.path for file in client_of(other).list_artifacts(sft.info.run_id)] == ["report.json"]
    assert sync(tmp_path / "t", uri=other) == sync(tmp_path / "t") == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(130), "KILLED")],
)
def test_how_a_stage_ended_is_how_its_runs_ended(
    store: str, tmp_path: Path, error: BaseException, status: str
) -> None:
    with (
        pytest.raises(type(error)),
        Tracker("run", tmp_path / "t") as tracker,
        tracker.stage("sft"),
    ):
        raise error
    assert {run.info.status for run in runs_of(store).values()} == {status}


def test_the_journal_of_a_training_loop_is_followed_over_a_restart(store: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Tracker("run", tmp_path / "t") as tracker, tracker.stage("dpo") as stage:
        stage.follow(path)
        write_steps(path, range(6), 0)
        until(lambda: "dpo" in runs_of(store) and len(history(store, runs_of(store)["dpo"], "loss")) == 6)
        write_steps(path, range(4, 9), 4)  # killed, and begun again from the checkpoint before step 4
        with Journal(path, None) as journal:
            journal.write({"step": 8, "evaluation": {"accuracy": 0.75}})
    dpo = runs_of(store)["dpo"]
    assert history(store, dpo, "norm") == [(step, float(step)) for step in range(9)]
    assert history(store, dpo, "evaluation/accuracy") == [(8, 0.75)]


def test_a_server_that_is_not_there_fails_at_once_and_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ServiceUnavailableError, match="MLFLOW_TRACKING_URI") as caught:
            Tracker("run", tmp_path / "t", uri=uri)
    assert "refused" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_a_server_that_takes_connections_and_says_nothing_fails_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.weights.registry.ANSWER_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ServiceUnavailableError, match="timed out"):
            Tracker("run", tmp_path / "t")


def test_a_folder_that_cant_be_written_is_said_in_one_line(store: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="write elsewhere"):
        Tracker("run", tmp_path / "file" / "t")
    with pytest.raises(OutputError, match="MLFLOW_TRACKING_URI"):
        Tracker("run", tmp_path / "t", uri=f"sqlite:///{tmp_path / 'file' / 'x.db'}")
    with pytest.raises(OutputError, match="no tracked run"):
        sync(tmp_path / "absent")


def test_a_journal_has_one_writer(store: str, tmp_path: Path) -> None:
    with Tracker("run", tmp_path / "t"), pytest.raises(InvalidInputError, match="a run in progress"):
        Tracker("run", tmp_path / "t")


def test_what_the_server_refuses_holds_nothing_up(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker("run", tmp_path / "t") as tracker, tracker.stage("sft") as stage:
        stage.log_dataset("x" * 1000, Path(__file__))
        until(lambda: "sft" in runs_of(store))
        artifacts = Path.cwd() / "mlruns" / "milonga" / runs_of(store)["sft"].info.run_id / "artifacts"
        artifacts.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_text("a file in the way")
        stage.log_bytes("report.json", b"{}")
        stage.log_metrics({"loss": 1.0})
    sft = runs_of(store)["sft"]
    assert (sft.info.status, sft.data.metrics["loss"]) == ("FINISHED", 1.0)
    printed = capsys.readouterr().err
    assert "refused 1 entries" in printed and "report.json" in printed
    artifacts.unlink()
    sync(tmp_path / "t")
    assert (artifacts / "report.json").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from training.loop.run_folder import Journal
from training.tracking import runs
runs.SEND_SECONDS = 1e9
tracker = runs.Tracker("run", Path(sys.argv[1]))
with tracker.stage("sft") as stage:
    stage.log_params({"lr": 1})
    stage.follow(Path(sys.argv[2]))
    journal = Journal(Path(sys.argv[2]), 0)
    for step in range(401):
        journal.write({"step": step, "loss": step})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_loses_nothing_that_it_logged(store: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "t"), str(tmp_path / "journal.jsonl")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    sync(tmp_path / "t")
    run = runs_of(store)["sft"]
    assert run.data.params == {"lr": "1"}
    assert history(store, run, "loss") == [(step, float(step)) for step in range(401)]


def test_a_server_that_is_killed_and_comes_back_has_every_metric_once(
    server: MLflowServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    folder, path = tmp_path / "t", tmp_path / "journal.jsonl"
    with Tracker("killed", folder, uri=server.uri) as tracker:
        with tracker.stage("sft") as stage:
            stage.follow(path)
            write_steps(path, range(50), 0)
            until(lambda: "sft" in runs_of(server.uri))
            until(lambda: history(server.uri, runs_of(server.uri)["sft"], "loss")[-1:] == [(49, 1 / 50)])
            server.kill()
            write_steps(path, range(50, 1500))
            stage.log_audio("after", np.zeros(1600, np.float32), 16_000, "A dog barks")
        with tracker.stage("dpo") as stage:  # begun while it was away
            stage.log_metrics({"loss": 1.0})
        until(lambda: "training continues" in capsys.readouterr().err)
    assert f"milonga train sync {folder}" in capsys.readouterr().err
    server.begin()
    server.wait()
    assert sync(folder, uri=server.uri) > 0
    runs = runs_of(server.uri)
    assert history(server.uri, runs["sft"], "loss") == [(step, 1 / (step + 1)) for step in range(1500)]
    assert history(server.uri, runs["sft"], "norm") == [(step, float(step)) for step in range(1500)]
    assert history(server.uri, runs["dpo"], "loss") == [(0, 1.0)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    # Its files are the server's: a path on the client is not a source there.
    assert runs["sft"].info.artifact_uri.startswith("mlflow-artifacts:")
    samples = client_of(server.uri).list_artifacts(runs["sft"].info.run_id, "samples")
    assert {file.path for file in samples} == {"samples/after.png", "samples/after.wav"}
    assert len(list(server.artifacts.rglob("after.wav"))) == 1
    # Once more, as if nothing had been marked: still each of them once.
    (folder / "sent.json").unlink()
    sync(folder, uri=server.uri)
    assert len(history(server.uri, runs["sft"], "loss")) == 1500
    assert len(runs_of(server.uri)) == len(runs)
