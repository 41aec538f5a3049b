"""Runs in MLflow: parameters, curves, sounds and data sets, by way of a folder on disk.

    with Tracker("mini", folder / "tracking", params=flatten(config)) as tracker:
        with tracker.stage("dpo") as stage:
            stage.log_params(flatten(config.dpo))
            stage.log_dataset("pairs", pairs_folder)
            stage.follow(run_folder / "journal.jsonl")     # the curves of training.loop.fit
            ...
            stage.log_audio("a-dog", waveform, 16_000, "A dog barks")
        tracker.parent.log_metrics({"in_order": 0.61})

A parent run, a child run for each stage. The server is MLFLOW_TRACKING_URI's; without it a database in the
current folder (`services.weights.registry`). It has to answer at the start. After that, logging writes to the
folder and returns; a thread publishes what the server lacks (`training.tracking.publisher`). A server that is
away delays nothing and loses nothing. The same call on the same folder continues the same runs; what a
session could not publish, `milonga train sync` does.
"""

import contextlib
import fcntl
import getpass
import hashlib
import importlib.metadata
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Final, Literal

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray

import services
from services.audio.encoding import encode_audio
from services.audio.spectrogram import spectrogram_png
from services.errors import OutputError, ServiceUnavailableError, invalid
from services.files import sha256_of, write_atomically
from services.models.manifest import digest_of_files, hash_files
from services.weights.registry import connect, database_path, tracking_uri
from training.loop.progress import say
from training.loop.run_folder import Journal
from training.tracking.publisher import (
    FILES,
    RUNS,
    Publisher,
    RunState,
    mlflow_name,
    numbers_of,
    one_line,
    read_runs,
    write_runs,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""Final status of a run, in MLflow's words."""

SEND_SECONDS: Final = 3.0
"""Seconds between two publications."""
LONGEST_WAIT: Final = 60.0
"""Maximum seconds between two attempts while the server is away."""
SYSTEM_SECONDS: Final = 10.0
"""Seconds between two measurements of processor and memory."""
CLOSE_SECONDS: Final = 20.0
"""Seconds that the end of a run waits for a server that accepts nothing."""


class TrackedRun:
    """A run to log to: the parent, or a stage. Logging writes to the tracking folder and returns."""

    def __init__(self, tracker: "Tracker", key: str) -> None:
        self.key = key
        self._tracker = tracker

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log settings, flat. The first value of a name stays: a resumed run may have others."""
        texts = {mlflow_name(name): "none" if value is None else str(value) for name, value in params.items()}
        with self._changes() as run:
            run.params = texts | run.params

    def log_metrics(self, metrics: Mapping[str, object]) -> None:
        """Log figures of the whole run. Values that are not numbers are left out."""
        with self._changes() as run:
            for name, value in numbers_of(metrics).items():
                # By text: NaN equals NaN.
                if name not in run.figures or str(run.figures[name][0]) != str(value):
                    run.figures[name] = (value, _now())

    def follow(self, journal: Path) -> None:
        """Log the curves in the journal of a training loop, as it grows."""
        path = os.path.relpath(journal, self._tracker.folder)
        with self._changes() as run:
            if path not in run.curves:
                run.curves.append(path)

    def log_artifact(self, path: Path) -> None:
        """Log a copy of a file. For reports; weights are registered instead."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise OutputError(f"{path} can't be read: {error.strerror}") from error
        self.log_bytes(path.name, content)

    def log_bytes(self, name: str, data: bytes) -> None:
        """Log a file by its path among the run's artifacts and its content."""
        parts = PurePosixPath(re.sub(r"[^\w./ =+-]+", "_", name)).parts
        path = PurePosixPath(*(part for part in parts if part not in ("/", "..")))
        write_atomically(self._tracker.folder / FILES / self.key / path, data)
        with self._changes() as run:
            run.files[str(path)] = hashlib.sha256(data).hexdigest()

    def log_audio(
        self, name: str, waveform_N: NDArray[np.float32], sampling_rate: int, caption: str = ""
    ) -> None:
        """Log a sound, ``samples/NAME.wav``, and its spectrogram under `caption`, ``samples/NAME.png``."""
        self.log_bytes(f"samples/{name}.wav", encode_audio(waveform_N, sampling_rate))
        picture = spectrogram_png(waveform_N, sampling_rate, title=caption or name)
        self.log_bytes(f"samples/{name}.png", picture)

    def log_dataset(self, name: str, path: Path) -> None:
        """Log a training set (a file, a folder) as the run's input and in the tag ``milonga.data.NAME``."""
        digest = data_digest(path)
        with self._changes() as run:
            run.datasets[name] = (str(path), digest)
            run.tags[f"milonga.data.{name}"] = digest

    @contextlib.contextmanager
    def _changes(self) -> Iterator[RunState]:
        with self._tracker.changes() as runs:
            yield runs[self.key]


class Tracker:
    """A tracked run and its stages; a context manager. One process tracks into a folder at a time."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        uri: str | None = None,
        params: Mapping[str, object] | None = None,
    ) -> None:
        """Begin a run, or continue the one in `folder`.

        Args:
            name: of the parent run.
            folder: the tracking folder; made if missing.
            uri: of the server; None: `services.weights.registry.tracking_uri`.
            params: settings of the whole run.

        Raises:
            ServiceUnavailableError: the server does not answer; within seconds.
            OutputError: the folder, or the local database, can't be written.
            InvalidInputError: another process tracks into `folder`.
        """
        client = _client(uri)
        self.folder = folder
        self._lock, self._guard = _locked(folder), threading.Lock()
        try:
            self._runs = read_runs(folder)
            self.parent = self._begin(name, None)
            self.parent.log_params(params or {})
            system = folder / f"{self.parent.key}.jsonl"
            self._system, self._system_at = Journal(system, None), 0.0
            self.parent.follow(system)
            self._publisher = Publisher(folder, client)
            self._publisher.publish()  # here and now: a server that takes nothing is reported at the start
        except ServiceUnavailableError as error:
            self._lock.close()
            raise ServiceUnavailableError(f"{error}, or set MLFLOW_TRACKING_URI to another") from error
        except BaseException:
            self._lock.close()
            raise
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._publish, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The parent run's id on the server."""
        return self._publisher.run_ids[self.parent.key]

    @property
    def hint(self) -> str:
        """Where to see the run: a command, or an address."""
        server = self._publisher.server
        return f"mlflow ui --backend-store-uri {server}" if database_path(server) else server

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.close(_status(error))

    @contextlib.contextmanager
    def changes(self) -> Iterator[dict[str, RunState]]:
        """The runs by key, to be changed inside and written at the end."""
        with self._guard:
            yield self._runs
            write_runs(self.folder, self._runs)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[TrackedRun]:
        """The child run `name`: the one of an earlier session, if there was one."""
        run = self._begin(name, self.parent.key)
        status: Status = "FINISHED"
        try:
            yield run
        except BaseException as error:
            status = _status(error)
            raise
        finally:
            self._end(run, status)

    def close(self, status: Status = "FINISHED") -> None:
        """End the run and publish the rest, unless the server accepts nothing for `CLOSE_SECONDS`."""
        self._end(self.parent, status)
        self._closing.set()
        sent, moved = self._publisher.sent, time.monotonic()
        while self._thread.is_alive() and time.monotonic() < moved + CLOSE_SECONDS:
            self._thread.join(0.1)
            if sent != self._publisher.sent:
                sent, moved = self._publisher.sent, time.monotonic()
        if self._thread.is_alive():
            self._given_up.set()
            say(
                f"tracking: {self._publisher.server} does not have all of this run; to send the rest: "
                f"milonga train sync {self.folder}"
            )
        self._system.close()
        self._lock.close()

    def _begin(self, name: str, parent: str | None) -> TrackedRun:
        with self.changes() as runs:
            same = (k for k, run in runs.items() if run.parent == parent and (run.name == name or not parent))
            key = next(same, None) or uuid.uuid4().hex
            tags = _own_tags() if parent is None else {}
            run = runs.setdefault(key, RunState(name=name, parent=parent, started=_now(), tags=tags))
            run.status = "RUNNING"
        return TrackedRun(self, key)

    def _end(self, run: TrackedRun, status: Status) -> None:
        with self.changes() as runs:
            runs[run.key].status, runs[run.key].ended = status, _now()

    def _publish(self) -> None:
        """Publish every few seconds; after `close`, until the server has everything. Runs on the thread."""
        wait, away = SEND_SECONDS, False
        while not self._given_up.is_set():
            closing = self._closing.wait(wait)
            try:
                self._log_system()
                self._publisher.publish()
            except Exception as error:  # the training must not end because of its tracking
                if not away:
                    say(f"tracking: {one_line(error)}; training continues, and {self.folder} keeps the rest")
                wait, away = min(2 * wait, LONGEST_WAIT), True
                self._given_up.wait(min(1.0, SEND_SECONDS) if closing else 0)
                continue
            if away:
                say(f"tracking: {self._publisher.server} is there again, and has everything")
            if closing:
                return
            wait, away = SEND_SECONDS, False

    def _log_system(self) -> None:
        if time.monotonic() - self._system_at >= SYSTEM_SECONDS:
            self._system_at = time.monotonic()
            self._system.write({"step": self._system.next_step, **system_metrics()})


def sync(folder: Path, *, uri: str | None = None) -> int:
    """Publish the entries of a tracking folder that the server lacks; return their number.

    Raises as `Tracker`, and `OutputError` if `folder` is no tracking folder.
    """
    if not (folder / RUNS).exists():
        raise OutputError(f"{folder} holds no tracked run; give the folder that the run named")
    publisher = Publisher(folder, _client(uri))
    with _locked(folder):
        publisher.publish()
    return publisher.sent


def data_digest(path: Path) -> str:
    """Return `sha256:` and the digest of a file, or of all files of a folder. Raises `OutputError`."""
    try:
        if path.is_dir():
            return digest_of_files(hash_files(path))
        return f"sha256:{sha256_of(path)}"
    except OSError as error:
        raise OutputError(f"the data at {path} can't be read: {error.strerror}") from error


def system_metrics() -> dict[str, float]:
    """Return figures of processor and memory, by MLflow's names."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found[f"system/gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
    return found


def _client(uri: str | None) -> "MlflowClient":
    """Return the client of the server. It leaves retries to us."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # We report once that the server is away; urllib3 would at each attempt.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return connect(tracking_uri(uri), create=True)


def _locked(folder: Path) -> IO[bytes]:
    """Return the lock on `folder`, made if missing; closing it frees the folder. Raises as `Tracker`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            lock.close()
            raise
    except BlockingIOError as error:
        raise invalid("--output", f"{folder} belongs to a run in progress; wait for its end") from error
    except OSError as error:
        raise OutputError(f"{folder} can't be written: {error.strerror}; write elsewhere") from error
    return lock


def _own_tags() -> dict[str, str]:
    """Return the tags of a parent run: user and code version."""
    tags = {
        "mlflow.source.name": "milonga train",
        "mlflow.source.type": "LOCAL",
        "milonga.version": importlib.metadata.version("milonga"),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    with contextlib.suppress(Exception):  # no git, no repository, no commit
        import git

        repository = git.Repo(Path(services.__file__).parents[1])
        tags["mlflow.source.git.commit"] = repository.head.commit.hexsha
        tags["milonga.changed"] = str(repository.is_dirty()).lower()
    return tags


def _status(error: BaseException | None) -> Status:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _now() -> int:
    """Return milliseconds since 1970."""
    return int(time.time() * 1000)
