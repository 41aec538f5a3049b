"""Tracking: runs, curves, sounds and data sets in MLflow, by way of a journal on disk.

    with Tracker.start("mini", folder / "tracking", params=flatten(config)) as tracker:
        with tracker.stage("dpo") as stage:
            stage.log_params(flatten(config.dpo))
            stage.log_dataset("pairs", pairs_folder)
            stage.follow(run_folder / "journal.jsonl")     # the curves of training.loop.loop.fit
            ...
            stage.log_audio("a-dog", waveform, 16_000, "A dog barks")
        tracker.parent.log_metrics({"in_order": 0.61})

A parent run, a child a stage. The server is MLFLOW_TRACKING_URI's; without it a database in the current
folder (`services.weights.registry`). It has to answer at the start. After that, everything is written to the
journal and sent from there by a thread, in batches: a server that is away holds nothing up and loses nothing,
and what was sent is not sent again. The same call on the same folder goes on with the same runs; what is left
of a journal, `milonga train sync` sends.

Only the main process of several tracks.
"""

import contextlib
import functools
import getpass
import hashlib
import io
import json
import logging
import numbers
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Literal, cast

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

import services
from services.audio.encoding import encode_audio
from services.audio.spectrogram import spectrogram_png
from services.errors import MilongaError, OutputError, ServiceUnavailableError
from services.models.manifest import digest_of, hash_files
from services.weights.registry import connect, database_path, shown, tracking_uri
from training.tracking.journal import FILES, Event, Follower, Mark, TrackingJournal
from training.tracking.register import EXPERIMENT, experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words."""

KEY_TAG: Final = "milonga.run"
"""Tag of a run: its key in the journal, by which it is found again."""

SEND_SECONDS: Final = 3.0
"""Time between two batches."""
LONGEST_WAIT: Final = 60.0
"""Time between two tries while the server is away, at most."""
FILE_TRIES: Final = 3
"""Tries after which a file that an answering server does not take is given up."""

METRICS_A_BATCH: Final = 1000
PAIRS_A_BATCH: Final = 100
"""MLflow's limits."""

# Wrong whenever it is sent; anything else may come right.
_REFUSALS: Final = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")


class TrackedRun:
    """A run to log to: the parent, or a stage. Logging writes to the journal and returns."""

    def __init__(self, tracker: "Tracker", key: str) -> None:
        self.key = key
        self._tracker = tracker

    def log_params(self, params: Mapping[str, object]) -> None:
        """Settings, flat. The first value of a name stands: a run that goes on may have others."""
        known = self._tracker.seen.params.setdefault(self.key, set())
        new = {_name(name): _text(value) for name, value in params.items() if _name(name) not in known}
        known.update(new)
        if new:
            self._write("params", values=new)

    def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """Figures of a step, or of the run as a whole.

        A metric's steps rise: one that was logged already is not logged again, so a stage that goes on after
        a kill may do some steps twice. What is not a number is left out.
        """
        new = {}
        for name, value in _numbers(metrics).items():
            place = (self.key, name)
            if step is None:
                if self._tracker.seen.figures.get(place) != value:
                    self._tracker.seen.figures[place] = new[name] = value
            elif step > self._tracker.seen.steps.get(place, -1):
                self._tracker.seen.steps[place] = step
                new[name] = value
        if new:
            self._write("metrics", step=step, values=new)

    def follow(self, journal: Path) -> None:
        """Log what a training loop writes into its journal, as it grows, to the end of this run."""
        if self._tracker.main:
            self._tracker.followers.append((self, Follower(journal)))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Digests, licence, parent version, …; the last value of a name stands."""
        if tags:
            self._write("tags", values={_name(name): _text(value) for name, value in tags.items()})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A copy of a file, into `folder` of the run's. For reports; weights are registered instead."""
        if self._tracker.main:
            target = self._file(f"{folder}/{path.name}")
            temporary = target.with_name(f".{target.name}.part")
            try:
                shutil.copyfile(path, temporary)
                temporary.replace(target)
            except OSError as error:
                raise OutputError(f"{path} can't be copied to {target}: {error.strerror}") from error
            self._sendable(target)

    def log_bytes(self, name: str, data: bytes) -> None:
        """A file by its path among the run's and its content."""
        if self._tracker.main:
            target = self._file(name)
            temporary = target.with_name(f".{target.name}.part")
            try:
                temporary.write_bytes(data)
                temporary.replace(target)
            except OSError as error:
                raise OutputError(f"{target} can't be written: {error.strerror}; free some space") from error
            self._sendable(target)

    def log_figure(self, name: str, figure: Figure | bytes) -> None:
        """A plot, or the PNG of one, as ``figures/NAME.png``."""
        if self._tracker.main:
            self.log_bytes(f"figures/{name}.png", figure if isinstance(figure, bytes) else _png(figure))

    def log_audio(
        self, name: str, waveform_N: NDArray[np.float32], sampling_rate: int, caption: str = ""
    ) -> None:
        """A sound as ``samples/NAME.wav``, with its spectrogram ``samples/NAME.png`` under `caption`."""
        if self._tracker.main:
            self.log_bytes(f"samples/{name}.wav", encode_audio(waveform_N, sampling_rate))
            picture = spectrogram_png(waveform_N, sampling_rate, title=caption or name)
            self.log_bytes(f"samples/{name}.png", picture)

    def log_dataset(
        self,
        name: str,
        source: Path | str,
        *,
        digest: str | None = None,
        context: str = "training",
        rows: int | None = None,
    ) -> None:
        """A data set that went in: the run's input in MLflow, and the tag ``milonga.data.NAME``.

        Args:
            name: for people.
            source: a file, a folder, or where it came from.
            digest: None: over the files at `source`.
            context: what it was for: training, validation, evaluation.
            rows: how many, if that is known.
        """
        if self._tracker.main:
            digest = digest or data_digest(Path(source))
            self._write("dataset", name=name, source=str(source), digest=digest, context=context, rows=rows)
            self.set_tags({f"milonga.data.{name}": digest})

    def _file(self, name: str) -> Path:
        """Where the run's file `name` waits to be sent."""
        parts = PurePosixPath(re.sub(r"[^\w./ =+-]+", "_", name)).parts
        target = self._tracker.folder.joinpath(FILES, self.key, *(p for p in parts if p not in ("/", "..")))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _sendable(self, target: Path) -> None:
        path = target.relative_to(self._tracker.folder / FILES / self.key).as_posix()
        self._write("file", path=path)

    def _write(self, kind: str, **content: object) -> None:
        self._tracker.write({"run": self.key, "kind": kind, "time": _now(), **content})


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What the journal holds already."""

    parent: str | None = None
    stages: dict[str, str] = field(default_factory=dict)
    """Keys by name."""
    params: dict[str, set[str]] = field(default_factory=dict)
    steps: dict[tuple[str, str], int] = field(default_factory=dict)
    """The last of each run and metric."""
    figures: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def of(cls, journal: TrackingJournal) -> "_Seen":
        seen = cls()
        for event, _ in journal.read():
            run, kind = event["run"], event["kind"]
            if kind == "start" and event["parent"] is None:
                seen.parent = run
            elif kind == "start":
                seen.stages[event["name"]] = run
            elif kind == "params":
                seen.params.setdefault(run, set()).update(event["values"])
            elif kind == "metrics" and event["step"] is None:
                seen.figures |= {(run, name): value for name, value in event["values"].items()}
            elif kind == "metrics":
                seen.steps |= {(run, name): event["step"] for name in event["values"]}
        return seen


class Tracker:
    """A tracked run and its stages. Made by `start`; a context manager."""

    def __init__(self, folder: Path, sender: "_Sender | None", seen: _Seen, close_seconds: float) -> None:
        self.folder, self.seen = folder, seen
        self.main = sender is not None
        self.followers: list[tuple[TrackedRun, Follower]] = []
        self._sender, self._close_seconds = sender, close_seconds
        self.parent = TrackedRun(self, seen.parent or "")
        self._following = threading.Lock()

    @classmethod
    def start(
        cls,
        parent: str,
        folder: Path,
        *,
        experiment: str = EXPERIMENT,
        uri: str | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        fresh: bool = False,
        main: bool = True,
        system_seconds: float = 10.0,
        close_seconds: float = 20.0,
    ) -> "Tracker":
        """Begin a run, or go on with the one in `folder`.

        Args:
            parent: name of the parent run.
            folder: of the journal; made if missing.
            experiment: where MLflow keeps it.
            uri: of the server; None: as `services.weights.registry.tracking_uri`.
            params: settings of the whole run.
            tags: of the parent run. Version and commit of milonga are added.
            fresh: give up what `folder` holds. Runs that were sent stay where they are.
            main: whether this is the main process; in any other, nothing is done.
            system_seconds: time between two looks at processor and memory; 0: never.
            close_seconds: how long the end waits for a server that is away.

        Raises:
            ServiceUnavailableError: the server does not answer; within seconds.
            OutputError: the folder, or the local database, can't be written.
            InvalidInputError: another process tracks into `folder`.
        """
        if not main:
            return cls(folder, None, _Seen(), close_seconds)
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        client = _client(uri)
        journal = TrackingJournal(folder)
        try:
            seen = _Seen.of(journal)
            if seen.parent is None:
                seen.parent = _key()
                event = {"name": parent, "parent": None, "tags": _own_tags()}
                journal.write({"run": seen.parent, "kind": "start", "time": _now(), **event})
            else:
                journal.write({"run": seen.parent, "kind": "again", "time": _now()})
            sender = _Sender(journal, client, experiment, system_seconds)
            tracker = cls(folder, sender, seen, close_seconds)
            tracker.parent.log_params(params or {})
            tracker.parent.set_tags(tags or {})
            sender.send()  # here and now: a server that takes nothing is told at the start
        except BaseException as error:
            journal.close()
            if isinstance(error, MilongaError | KeyboardInterrupt):
                raise
            raise ServiceUnavailableError(
                f"the MLflow server {shown(client.tracking_uri)} refused the run: {_one_line(error)}; set "
                "MLFLOW_TRACKING_URI to another"
            ) from error
        sender.start(tracker)
        return tracker

    @property
    def run_id(self) -> str | None:
        """The parent run's id on the server; None in processes other than the main one."""
        return None if self._sender is None else self._sender.mark.runs[self.parent.key]

    @property
    def hint(self) -> str:
        """How to look at it, for people."""
        uri = "" if self._sender is None else self._sender.uri
        return f"mlflow ui --backend-store-uri {uri}" if database_path(uri) else shown(uri)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.close(_status(error))

    @contextlib.contextmanager
    def stage(self, name: str, tags: Mapping[str, object] | None = None) -> Iterator[TrackedRun]:
        """The child run `name`: the one of an earlier session, if there was one."""
        key = self.seen.stages.get(name)
        again = key is not None
        run = TrackedRun(self, key or _key())
        if again:
            self.write({"run": run.key, "kind": "again", "time": _now()})
        else:
            self.seen.stages[name] = run.key
            event = {"name": name, "parent": self.parent.key, "tags": {}}
            self.write({"run": run.key, "kind": "start", "time": _now(), **event})
        run.set_tags(tags or {})
        status: Status = "FINISHED"
        try:
            yield run
        except BaseException as error:
            status = _status(error)
            raise
        finally:
            self.collect()
            self.followers = [(other, follower) for other, follower in self.followers if other is not run]
            self.write({"run": run.key, "kind": "end", "time": _now(), "status": status})

    def write(self, event: Event) -> None:
        """Append to the journal, in the main process."""
        if self._sender is not None:
            self._sender.journal.write(event)

    def collect(self) -> None:
        """Take over what the loops that are followed have written."""
        with self._following:
            for run, follower in self.followers:
                for row in follower.rows():
                    step = row.get("step")
                    run.log_metrics({k: v for k, v in row.items() if k != "step"}, step)

    def close(self, status: Status = "FINISHED") -> None:
        """End the run, and send what is left, for as long as `close_seconds`."""
        if self._sender is None:
            return
        self.collect()
        self.write({"run": self.parent.key, "kind": "end", "time": _now(), "status": status})
        left = self._sender.finish(self._close_seconds)
        self._sender.journal.close()
        if left:
            _tell(
                f"tracking: {left} entries of {self.folder} were not sent; once the server is there again: "
                f"milonga train sync {self.folder}"
            )


def sync(folder: Path, *, experiment: str = EXPERIMENT, uri: str | None = None) -> int:
    """Send what a journal holds and the server has not, and return how many entries that were.

    Raises as `Tracker.start`, and `OutputError` where there is no journal.
    """
    if not (folder / FILES).is_dir():
        raise OutputError(f"{folder} holds no tracked run; give the folder that the run named")
    client = _client(uri)
    journal = TrackingJournal(folder)
    try:
        sender = _Sender(journal, client, experiment, 0.0)
        before = sender.left()
        sender.send()
        return before
    except _AwayError as error:
        raise ServiceUnavailableError(f"the MLflow server went away: {error}; try again") from error
    finally:
        journal.close()


def data_digest(path: Path) -> str:
    """`sha256:` and the digest of a file, or over all files of a folder. Raises `OutputError`."""
    try:
        if path.is_dir():
            return digest_of(hash_files(path))
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise OutputError(f"the data at {path} can't be read: {error.strerror}") from error


class _AwayError(Exception):
    """The server did not take something that it may take later."""


class _LostError(Exception):
    """The server does not know what it was sent."""


class _Sender:
    """Sends a journal, in order, and marks how far it came."""

    def __init__(
        self, journal: TrackingJournal, client: "MlflowClient", experiment: str, system_seconds: float
    ) -> None:
        self.journal, self.client, self.uri = journal, client, str(client.tracking_uri)
        self.server = f"{shown(self.uri)} {experiment}"
        self.mark = journal.mark(self.server)
        self._experiment = experiment_id(client, experiment)
        self._system_seconds, self._system_at = system_seconds, 0.0
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None
        self._lost_before = False
        self._tries: dict[int, int] = {}

    # ------------------------------------------------------------------------------------------ the thread

    def start(self, tracker: Tracker) -> None:
        """Send every few seconds from now on."""
        self._thread = threading.Thread(target=self._run, args=(tracker,), name="tracking", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> int:
        """Send the rest, unless nothing goes for `seconds`; entries that are still left then."""
        moved, offset = time.monotonic(), self.mark.offset
        self._deadline = moved + seconds
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.1)
            if self.mark.offset != offset:
                moved, offset = time.monotonic(), self.mark.offset
            elif time.monotonic() > moved + seconds + 1:
                break
        return self.left()

    def left(self) -> int:
        """Entries that were not sent."""
        return sum(1 for _ in self.journal.read(self.mark.offset))

    def _run(self, tracker: Tracker) -> None:
        wait, away = SEND_SECONDS, False
        while True:
            stopping = self._stop.wait(wait)
            if stopping and away:
                time.sleep(min(1.0, SEND_SECONDS))
            try:
                if not stopping:
                    tracker.collect()
                    self._look_at_system(tracker)
                self.send()
            except Exception as error:  # the training must not end with what watches it
                if not away:
                    _tell(
                        f"tracking: {shown(self.uri)} takes nothing ({_one_line(error)}); training goes on, "
                        f"and {self.journal.folder} keeps what is to be sent"
                    )
                wait, away = min(2 * wait, LONGEST_WAIT), True
                if stopping and time.monotonic() > self._deadline:
                    return
                continue
            if away:
                _tell(f"tracking: {shown(self.uri)} is there again, and has everything")
            wait, away = SEND_SECONDS, False
            if stopping:
                return

    def _look_at_system(self, tracker: Tracker) -> None:
        now = time.monotonic()
        if not self._system_seconds or now - self._system_at < self._system_seconds:
            return
        self._system_at = now
        step = tracker.seen.steps.get((tracker.parent.key, "system/cpu_utilization_percentage"), -1) + 1
        tracker.parent.log_metrics(system_metrics(), step)

    # --------------------------------------------------------------------------------------------- sending

    def send(self) -> None:
        """Send all that the journal holds. Raises `_AwayError`; what was sent before is marked."""
        try:
            self._send()
        except _LostError:
            # Another database behind the same address: it gets everything.
            self._lost_before, self.mark = True, Mark()
            self._send()

    def _send(self) -> None:
        batch: list[Metric] = []
        run, end = "", self.mark.offset
        for event, after in self.journal.read(self.mark.offset):
            metrics = _metrics(event) if event["kind"] == "metrics" else []
            if batch and (not metrics or event["run"] != run or len(batch) + len(metrics) > METRICS_A_BATCH):
                self._deliver(end, functools.partial(self._log, run, batch))
                batch = []
            if metrics:
                batch, run, end = batch + metrics, event["run"], after
            else:
                self._deliver(after, functools.partial(self._apply, event))
        if batch:
            self._deliver(end, functools.partial(self._log, run, batch))

    def _deliver(self, end: int, send: Callable[[], None]) -> None:
        """Send one thing, and mark that the server has the journal up to `end`."""
        from mlflow.exceptions import MlflowException

        try:
            send()
        except MlflowException as error:
            code = str(error.error_code)
            if code == "RESOURCE_DOES_NOT_EXIST" and not self._lost_before:
                raise _LostError(_one_line(error)) from error
            if code not in (*_REFUSALS, "RESOURCE_DOES_NOT_EXIST"):
                raise _AwayError(_one_line(error)) from error
            _tell(f"tracking: {shown(self.uri)} refused an entry of the journal: {_one_line(error)}")
        except (OutputError, _AwayError):
            raise
        except Exception as error:  # of requests, of a database's driver
            raise _AwayError(_one_line(error)) from error
        self.mark.offset = end
        self.journal.set_mark(self.server, self.mark)

    def _log(self, run: str, metrics: Sequence["Metric"]) -> None:
        if run in self.mark.runs:  # else it was refused, and told
            for start in range(0, len(metrics), METRICS_A_BATCH):
                self.client.log_batch(self.mark.runs[run], metrics=metrics[start : start + METRICS_A_BATCH])

    def _apply(self, event: Event) -> None:
        from mlflow.entities import Param, RunTag

        if event["kind"] == "start":
            self._begin(event)
            return
        run_id = self.mark.runs.get(event["run"])
        if run_id is None:
            return
        match event["kind"]:
            case "again":
                self.client.update_run(run_id, status="RUNNING")
            case "params":
                for part in _parts(event["values"]):
                    self.client.log_batch(run_id, params=[Param(k, v) for k, v in part])
            case "tags":
                for part in _parts(event["values"]):
                    self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in part])
            case "dataset":
                self._log_dataset(run_id, event)
            case "file":
                self._log_file(run_id, event)
            case "end":
                self.client.set_terminated(run_id, event["status"], event["time"])
            case _:
                raise AssertionError(event["kind"])

    def _begin(self, event: Event) -> None:
        """The run of this key: an earlier try may have made it and not lived to write its id down."""
        key, parent = event["run"], event["parent"]
        found = self.client.search_runs([self._experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if found:
            self.mark.runs[key] = found[0].info.run_id
            return
        tags = {**event["tags"], KEY_TAG: key}
        if parent is not None:
            tags["mlflow.parentRunId"] = self.mark.runs[parent]
        run = self.client.create_run(self._experiment, event["time"], tags, event["name"])
        self.mark.runs[key] = run.info.run_id

    def _log_dataset(self, run_id: str, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        facts = {"digest": event["digest"]} | ({} if event["rows"] is None else {"num_rows": event["rows"]})
        dataset = Dataset(
            name=event["name"],
            digest=event["digest"].removeprefix("sha256:")[:36],  # MLflow holds no more of it
            source_type="local" if "://" not in event["source"] else "http",
            source=json.dumps({"uri": event["source"]}),
            profile=json.dumps(facts),
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])]
        self.client.log_inputs(run_id, datasets=inputs)

    def _log_file(self, run_id: str, event: Event) -> None:
        """Send a file. One that the server refuses again and again must not hold up all the rest."""
        path = self.journal.folder / FILES / event["run"] / event["path"]
        folder = str(PurePosixPath(event["path"]).parent)
        if not path.exists():
            _tell(f"tracking: {path} is gone and was not sent")
            return
        try:
            self.client.log_artifact(run_id, str(path), None if folder == "." else folder)
        except Exception as error:
            self.client.get_run(run_id)  # raises where it is the server that is away
            tries = self._tries[self.mark.offset] = self._tries.get(self.mark.offset, 0) + 1
            if tries < FILE_TRIES:
                raise _AwayError(_one_line(error)) from error
            _tell(f"tracking: {path} was refused {tries} times and is not sent: {_one_line(error)}")


def system_metrics() -> dict[str, float]:
    """Processor and memory, by MLflow's names."""
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
    """The client of the server. It does not try for minutes what we try again ourselves."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # One line when the server goes away is ours; not one for each try.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return connect(tracking_uri(uri), create=True)


def _metrics(event: Event) -> list["Metric"]:
    from mlflow.entities import Metric

    time_, step = event["time"], event["step"] or 0
    return [Metric(name, value, time_, step) for name, value in event["values"].items()]


def _numbers(metrics: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """The numbers among `metrics`, groups of them by path."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, numbers.Real | torch.Tensor | np.generic):
            found[_name(prefix + name)] = float(cast(float, value))
    return found


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _parts(values: Mapping[str, str]) -> Iterator[Sequence[tuple[str, str]]]:
    pairs = list(values.items())
    for start in range(0, len(pairs), PAIRS_A_BATCH):
        yield pairs[start : start + PAIRS_A_BATCH]


def _name(name: str) -> str:
    """`name` in letters that MLflow takes."""
    return re.sub(r"[^\w.\-/ :]", "_", name).strip("/")[:250]


def _text(value: object) -> str:
    return "none" if value is None else str(value)


def _own_tags() -> dict[str, str]:
    """Who ran what."""
    from importlib.metadata import version

    tags = {
        "mlflow.source.name": "milonga train",
        "mlflow.source.type": "LOCAL",
        "milonga.version": version("milonga"),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["milonga.changed"] = str(commit.endswith("-dirty")).lower()
    return tags


def git_commit() -> str | None:
    """The commit that milonga's own sources are at, with ``-dirty`` where they differ; None without git."""
    root = Path(services.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _status(error: BaseException | None) -> Status:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _key() -> str:
    return uuid.uuid4().hex


def _now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _tell(text: str) -> None:
    """A line for people, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
