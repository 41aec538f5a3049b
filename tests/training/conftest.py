import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.weights.registry import LOCAL_STORE, connect
from tests.training.tracking.mlflow_server import MLflowServer

# MLflow reads them when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without anything in it: making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("mlflow")
    connect(f"sqlite:///{folder / 'made.db'}", create=True)
    with (
        contextlib.closing(sqlite3.connect(folder / "made.db")) as made,
        contextlib.closing(sqlite3.connect(folder / "empty.db")) as empty,
    ):
        made.backup(empty)  # with what still stands in its write-ahead log
    return folder / "empty.db"


@pytest.fixture(scope="session")
def starting_server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[MLflowServer]:
    """A remote MLflow server that takes its time; modules ask for it at once, and need it at their end."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    server = MLflowServer(folder, Path(shutil.copy(empty_store, folder / "server.db")))
    server.begin()
    yield server
    server.kill()


@pytest.fixture
def server(starting_server: MLflowServer) -> MLflowServer:
    """It, ready."""
    starting_server.wait()
    return starting_server


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The local default: a database in the current folder, which is empty but for that."""
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(empty_store, work / LOCAL_STORE)
    monkeypatch.chdir(work)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    return f"sqlite:///{work / LOCAL_STORE}"
