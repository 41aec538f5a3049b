import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run

from services.errors import InvalidInputError, OutputError, ServiceUnavailableError
from tests.training.tracking.mlflow_server import MLflowServer
from tests.waiting import until
from training.loop.run_folder import Journal
from training.tracking import tracking
from training.tracking.journal import Follower, TrackingJournal
from training.tracking.tracking import Tracker, sync


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


def test_a_run_with_its_stages_is_in_the_local_database(store: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.csv"
    data.write_text("prompt,chosen\n")
    figure = Figure()
    figure.subplots().plot([1, 2])
    with Tracker.start("mini", tmp_path / "t", params={"seed": 3}, tags={"license": "Apache-2.0"}) as tracker:
        assert tracker.hint == f"mlflow ui --backend-store-uri {store}"
        with tracker.stage("dpo", tags={"parent": "mini-base"}) as stage:
            stage.log_params(
                {f"p{i}": i for i in range(150)} | {"rate": 1e-5, "none": None, "odd, name": "x"}
            )
            for step in range(2500):
                stage.log_metrics(squares(step), step)
            stage.log_metrics({"fad": 1.5, "order": {"all": 0.5}, "word": "text", "nan": math.nan})
            stage.log_dataset("pairs", data, rows=0)
            stage.log_audio("first/a dog", np.zeros(16_000, np.float32), 16_000, "A dog barks")
            stage.log_figure("curve", figure)
            stage.log_artifact(data, "data")
        assert tracker.run_id is not None
    runs = runs_of(store)
    parent, dpo = runs["mini"], runs["dpo"]
    assert (parent.info.run_id, parent.info.status) == (tracker.run_id, "FINISHED")
    assert dpo.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert (parent.data.params, parent.data.tags["license"]) == ({"seed": "3"}, "Apache-2.0")
    if tracking.git_commit() is not None:
        assert len(parent.data.tags["mlflow.source.git.commit"]) == 40
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
    assert json.loads(dataset.dataset.profile or "") == {"digest": digest, "num_rows": 0}
    assert dpo.data.tags["milonga.data.pairs"] == digest
    lies = Path.cwd() / "mlruns" / "milonga" / dpo.info.run_id / "artifacts"
    files = {path.relative_to(lies).as_posix() for path in lies.rglob("*") if path.is_file()}
    assert files == {
        "data/pairs.csv", "figures/curve.png", "samples/first/a dog.png", "samples/first/a dog.wav",
    }  # fmt: skip
    assert (lies / "samples/first/a dog.wav").read_bytes()[:4] == b"RIFF"


def test_a_run_goes_on_with_the_same_runs_and_steps_done_twice_are_logged_once(
    store: str, tmp_path: Path
) -> None:
    for first, steps, noise in ((0, 7, 0.0), (5, 10, 0.5)):
        with (
            Tracker.start("run", tmp_path / "t", params={"lr": first}, system_seconds=0) as tracker,
            tracker.stage("sft") as stage,
        ):
            stage.log_metrics({"fad": 2.0})
            stage.log_params({"lr": first})
            for step in range(first, steps):
                stage.log_metrics({"loss": float(step), "seconds": step + noise}, step)
    runs = runs_of(store)
    assert set(runs) == {"run", "sft"}
    assert history(store, runs["sft"], "loss") == [(step, float(step)) for step in range(10)]
    assert history(store, runs["sft"], "seconds") == [(s, s + (0.0 if s < 7 else 0.5)) for s in range(10)]
    assert history(store, runs["sft"], "fad") == [(0, 2.0)]
    assert runs["sft"].data.params == {"lr": "0"}
    assert runs["run"].info.status == "FINISHED"


def test_what_is_sent_again_is_kept_once(store: str, tmp_path: Path) -> None:
    with Tracker.start("run", tmp_path / "t") as tracker, tracker.stage("sft") as stage:
        stage.log_metrics({"loss": 1.0, "nan": math.nan}, 0)
        stage.log_metrics({"loss": 0.5, "nan": math.nan}, 1)
        stage.log_dataset("pairs", "https://example.org/pairs", digest="sha256:" + "1" * 64)
        stage.log_bytes("report.json", b"{}")
    before = runs_of(store)
    (tmp_path / "t" / "sent.json").unlink()  # as if killed between sending and marking, every time
    assert sync(tmp_path / "t") > 5
    assert sync(tmp_path / "t") == 0
    runs = runs_of(store)
    assert {name: run.info.run_id for name, run in runs.items()} == {
        name: run.info.run_id for name, run in before.items()
    }
    assert history(store, runs["sft"], "loss") == [(0, 1.0), (1, 0.5)]
    assert len(history(store, runs["sft"], "nan")) == 2
    assert runs["sft"].inputs is not None
    assert len(runs["sft"].inputs.dataset_inputs) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(130), "KILLED")],
)
def test_how_a_stage_ended_is_how_its_runs_ended(
    store: str, tmp_path: Path, error: BaseException, status: str
) -> None:
    with (
        pytest.raises(type(error)),
        Tracker.start("run", tmp_path / "t") as tracker,
        tracker.stage("sft"),
    ):
        raise error
    assert {run.info.status for run in runs_of(store).values()} == {status}


def test_the_journal_of_a_training_loop_is_followed_over_a_restart(store: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Tracker.start("run", tmp_path / "t") as tracker, tracker.stage("dpo") as stage:
        stage.follow(path)
        with Journal(path, 0) as journal:
            for step in range(6):
                journal.write({"step": step, "loss": float(step)})
        until(lambda: tracker.seen.steps.get((stage.key, "loss")) == 5)
        with Journal(path, 4) as journal:  # killed, and begun again from the checkpoint before step 4
            for step in range(4, 9):
                journal.write({"step": step, "loss": float(step)})
            journal.write({"step": 8, "evaluation": {"accuracy": 0.75}})
    dpo = runs_of(store)["dpo"]
    assert history(store, dpo, "loss") == [(step, float(step)) for step in range(9)]
    assert history(store, dpo, "evaluation/accuracy") == [(8, 0.75)]


def test_processes_other_than_the_main_one_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    with Tracker.start("run", folder, main=False, params={"a": 1}) as tracker, tracker.stage("x") as stage:
        stage.log_params({"b": 1})
        stage.log_metrics({"loss": 1.0}, 0)
        stage.log_audio("a", np.zeros(10, np.float32), 16_000)
        stage.log_dataset("d", "absent")
        stage.follow(tmp_path / "journal.jsonl")
    assert not folder.exists()
    assert tracker.run_id is None


def test_a_server_that_is_not_there_fails_at_once_and_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ServiceUnavailableError, match="MLFLOW_TRACKING_URI") as caught:
            Tracker.start("run", tmp_path / "t", uri=uri)
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
            Tracker.start("run", tmp_path / "t")


def test_a_folder_that_cant_be_written_is_said_in_one_line(store: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="write elsewhere"):
        Tracker.start("run", tmp_path / "file" / "t")
    with pytest.raises(OutputError, match="MLFLOW_TRACKING_URI"):
        Tracker.start("run", tmp_path / "t", uri=f"sqlite:///{tmp_path / 'file' / 'x.db'}")
    with pytest.raises(OutputError, match="no tracked run"):
        sync(tmp_path / "absent")


def test_a_journal_has_one_writer(store: str, tmp_path: Path) -> None:
    with Tracker.start("run", tmp_path / "t"), pytest.raises(InvalidInputError, match="going on"):
        Tracker.start("run", tmp_path / "t")


def test_an_entry_that_is_refused_holds_nothing_up(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker.start("run", tmp_path / "t") as tracker:
        tracker.write({"run": tracker.parent.key, "kind": "params", "time": 0, "values": {"a": "1"}})
        tracker.write({"run": tracker.parent.key, "kind": "params", "time": 0, "values": {"a": "2"}})
        tracker.parent.log_metrics({"loss": 1.0}, 0)
    run = runs_of(store)["run"]
    assert (run.data.params, run.data.metrics["loss"]) == ({"a": "1"}, 1.0)
    assert "refused an entry" in capsys.readouterr().err


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    journal = TrackingJournal(tmp_path)
    journal.write({"n": 1}, {"n": 2})
    journal.close()
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"n": 3' + b" " * 70_000)
    journal = TrackingJournal(tmp_path)
    journal.write({"n": 4})
    assert [event["n"] for event, _ in journal.read()] == [1, 2, 4]
    journal.close()


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    journal = TrackingJournal(tmp_path)

    def write(t: int) -> None:
        for n in range(200):
            journal.write({"t": t, "n": n})

    threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [event for event, _ in journal.read()]
    assert all([e["n"] for e in events if e["t"] == t] == list(range(200)) for t in range(4))
    journal.close()


def test_a_follower_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "journal.jsonl")
    assert list(follower.rows()) == []
    with (tmp_path / "journal.jsonl").open("w") as file:
        file.write('{"step": 0}\n{"st')
        file.flush()
        assert list(follower.rows()) == [{"step": 0}]
        file.write('ep": 1}\n')
        file.flush()
        assert list(follower.rows()) == [{"step": 1}]


KILLED = """
import sys, time
from pathlib import Path
from training.tracking.journal import TrackingJournal
journal = TrackingJournal(Path(sys.argv[1]))
journal.write({"run": "a1", "kind": "start", "time": 5, "name": "sft", "parent": None, "tags": {}})
for step in range(401):
    journal.write({"run": "a1", "kind": "metrics", "time": step, "step": step, "values": {"loss": step}})
print("ready", flush=True)
time.sleep(60)
"""  # what `Tracker` does, without the seconds that its imports take


def test_a_process_that_is_killed_loses_nothing_that_it_logged(store: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "t")], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    sync(tmp_path / "t")
    run = runs_of(store)["sft"]
    assert history(store, run, "loss") == [(step, float(step)) for step in range(401)]


def test_a_server_that_is_killed_and_comes_back_has_every_metric_once(
    server: MLflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "t"
    with Tracker.start("killed", folder, uri=server.uri, close_seconds=0.2) as tracker:
        with tracker.stage("sft") as stage:
            for step in range(50):
                stage.log_metrics(squares(step), step)
            until(lambda: "sft" in runs_of(server.uri))
            until(lambda: history(server.uri, runs_of(server.uri)["sft"], "loss")[-1:] == [(49, 1 / 50)])
            server.kill()
            for step in range(50, 1500):  # returns: nobody waits for a dead server
                stage.log_metrics(squares(step), step)
            stage.log_audio("after", np.zeros(1600, np.float32), 16_000, "A dog barks")
        with tracker.stage("dpo") as stage:  # begun while it was away
            stage.log_metrics({"loss": 1.0}, 0)
        until(lambda: "training goes on" in capsys.readouterr().err)
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
    # The whole journal once more, as if no mark had been kept: still each of them once.
    (folder / "sent.json").unlink()
    sync(folder, uri=server.uri)
    assert len(history(server.uri, runs["sft"], "loss")) == 1500
    assert len(runs_of(server.uri)) == len(runs)
