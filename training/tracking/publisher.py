"""Publish a tracking folder to an MLflow server: send what the server lacks of it.

``runs.json``  the runs: parameters, tags, figures, data sets, files, the journals of their curves, status
``files/``     the artifacts, by run
``sent.json``  digests of the files that each MLflow run has

The cursor of a curve is the server's own: the last step that it has of each metric. So a metric arrives once,
whatever was killed or sent twice, and a server that was away or is new gets all that it lacks.
"""

import json
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Literal, TypeVar, cast

import numpy as np
import torch

from services.errors import MilongaError, OutputError, ServiceUnavailableError
from services.files import write_atomically
from services.weights.registry import shown
from training.loop.progress import say
from training.loop.run_folder import JournalReader
from training.tracking.register import experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

RUNS, FILES, SENT = "runs.json", "files", "sent.json"

KEY_TAG: Final = "milonga.run"
"""Tag of a run: its key in `RUNS`, by which a later session finds it on the server."""
METRICS_PER_BATCH: Final = 1000
PAIRS_PER_BATCH: Final = 100
"""MLflow's limits."""

# Errors that trying again does not cure.
_REFUSALS: Final = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")

Item = TypeVar("Item")


@dataclass(kw_only=True, slots=True)
class RunState:
    """A run as MLflow should have it. Times are in milliseconds since 1970."""

    name: str
    parent: str | None
    """Key of the parent run."""
    started: int
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    figures: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Metrics of the run as a whole: value and time."""
    datasets: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Path and digest, by name."""
    files: dict[str, str] = field(default_factory=dict)
    """Digest of each artifact, by its path."""
    curves: list[str] = field(default_factory=list)
    """Journals of `training.loop.run_folder`, relative to the tracking folder."""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "RUNNING"
    ended: int = 0


def read_runs(folder: Path) -> dict[str, RunState]:
    """Return a tracking folder's runs by key, parents first. Raises `OutputError` if `RUNS` is damaged."""
    path = folder / RUNS
    try:
        return {key: RunState(**run) for key, run in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} can't be read: {error}; remove {folder} to track a new run") from error


def write_runs(folder: Path, runs: Mapping[str, RunState]) -> None:
    """Replace `RUNS`. Raises `OutputError`; the old file is then untouched."""
    content = {key: asdict(run) for key, run in runs.items()}
    write_atomically(folder / RUNS, json.dumps(content, indent=1) + "\n")


class Publisher:
    """Sends one tracking folder to one server."""

    def __init__(self, folder: Path, client: "MlflowClient") -> None:
        self.folder, self.client, self.server = folder, client, shown(str(client.tracking_uri))
        self.run_ids: dict[str, str] = {}
        """MLflow's ids of the runs, by key."""
        self.sent = 0
        """Entries sent so far."""
        self._published: dict[str, str] = {}
        """State of each run on the server."""
        self._steps: dict[str, dict[str, int]] = {}
        """The last step that the server has, by run and metric."""
        self._readers: dict[tuple[str, str], JournalReader] = {}
        self._refused: set[tuple[str, str, str]] = set()
        try:
            self._files: dict[str, dict[str, str]] = json.loads((folder / SENT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._files = {}  # lost: files are sent again, to the same place

    def publish(self) -> None:
        """Send what the server lacks.

        Raises `ServiceUnavailableError` if the server is away; what was sent is not sent again.
        """
        try:
            for key, run in read_runs(self.folder).items():
                if self._published.get(key) != repr(run):
                    self._publish_state(key, run)
                    self._published[key] = repr(run)
                for points in _batches(self._new_points(key, run), METRICS_PER_BATCH):
                    self._send(len(points), self.client.log_batch, self.run_ids[key], metrics=points)
                    self._steps[key] |= {point.key: point.step for point in points}
        except Exception as error:  # MLflow's, those of requests, of a database's driver
            # Which part of the request arrived is unknown. The next call asks the server.
            self._published.clear()
            self._readers.clear()
            if isinstance(error, MilongaError):
                raise
            raise ServiceUnavailableError(
                f"the MLflow server {self.server} went away: {one_line(error)}; start it again"
            ) from error

    def _publish_state(self, key: str, run: RunState) -> None:
        """Send all but the curves."""
        from mlflow.entities import Metric, Param, RunTag

        there, client = self._find_or_create(key, run), self.client
        run_id = there.info.run_id
        tags = [RunTag(name, text) for name, text in run.tags.items() if there.data.tags.get(name) != text]
        for some in _batches(tags, PAIRS_PER_BATCH):
            self._send(len(some), client.log_batch, run_id, tags=some)
        params = [Param(name, text) for name, text in run.params.items() if name not in there.data.params]
        for settings in _batches(params, PAIRS_PER_BATCH):
            self._send(len(settings), client.log_batch, run_id, params=settings)
        points = {point.key: point for point in there.data.to_proto().metrics}
        self._steps[key] = {name: point.step for name, point in points.items()}
        figures = [
            Metric(name, value, time, 0)
            for name, (value, time) in run.figures.items()
            if name not in points or points[name].timestamp != time
        ]
        for batch in _batches(figures, METRICS_PER_BATCH):
            self._send(len(batch), client.log_batch, run_id, metrics=batch)
        inputs = there.inputs.dataset_inputs if there.inputs is not None else []
        known = {(given.dataset.name, given.dataset.digest) for given in inputs}
        for name, (path, digest) in run.datasets.items():
            if (name, _short(digest)) not in known:
                self._send(1, self._log_dataset, run_id, name, path, digest)
        for path, digest in run.files.items():
            self._send_file(key, run_id, path, digest)
        if run.status == "RUNNING" != there.info.status:
            self._send(1, client.update_run, run_id, status="RUNNING")
        elif run.status != "RUNNING" and (there.info.status, there.info.end_time) != (run.status, run.ended):
            self._send(1, client.set_terminated, run_id, run.status, run.ended)

    def _find_or_create(self, key: str, run: RunState) -> "Run":
        """Return the run with this key on the server. A session that was killed may have created it."""
        experiment = experiment_id(self.client)
        found: list[Run] = self.client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if not found:
            tags = {**run.tags, KEY_TAG: key}
            if run.parent is not None:
                tags["mlflow.parentRunId"] = self.run_ids[run.parent]
            found = [self.client.create_run(experiment, run.started, tags, run.name)]
            self.sent += 1
        self.run_ids[key] = found[0].info.run_id
        return found[0]

    def _new_points(self, key: str, run: RunState) -> Iterator["Metric"]:
        """The points of each curve after the last that the server has."""
        from mlflow.entities import Metric

        for path in run.curves:
            for row in self._readers.setdefault((key, path), JournalReader(self.folder / path)).rows():
                step, time = row.pop("step"), row.pop("time", run.started)
                for name, value in numbers_of(row).items():
                    if step > self._steps[key].get(name, -1):
                        yield Metric(name, value, time, step)

    def _log_dataset(self, run_id: str, name: str, path: str, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, profile = json.dumps({"uri": path}), json.dumps({"digest": digest})
        dataset = Dataset(name, _short(digest), source_type="local", source=source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        self.client.log_inputs(run_id, datasets=inputs)

    def _send_file(self, key: str, run_id: str, path: str, digest: str) -> None:
        """Send an artifact that the server lacks. One that it refuses is left to the next session."""
        if self._files.get(run_id, {}).get(path) == digest or (run_id, path, digest) in self._refused:
            return
        local, folder = self.folder / FILES / key / path, str(PurePosixPath(path).parent)
        try:
            self.client.log_artifact(run_id, str(local), None if folder == "." else folder)
        except Exception as error:
            self.client.get_run(run_id)  # raises where it is the server that is away
            self._refused.add((run_id, path, digest))
            say(
                f"tracking: {self.server} refused {local}: {one_line(error)}; to try again: "
                f"milonga train sync {self.folder}"
            )
            return
        self.sent += 1
        self._files.setdefault(run_id, {})[path] = digest
        write_atomically(self.folder / SENT, json.dumps(self._files, indent=1) + "\n")

    def _send(self, count: int, call: Callable[..., object], *arguments: object, **named: object) -> None:
        """Make a call that sends `count` entries. What the server refuses is reported and left out."""
        from mlflow.exceptions import MlflowException

        try:
            call(*arguments, **named)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            say(f"tracking: {self.server} refused {count} entries: {one_line(error)}")
        self.sent += count


def numbers_of(metrics: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Return the numbers among `metrics`, groups of them by path, under names that MLflow accepts."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, numbers.Real | torch.Tensor | np.generic):
            found[mlflow_name(prefix + name)] = float(cast(float, value))
    return found


def mlflow_name(name: str) -> str:
    """Return `name` in characters that MLflow accepts in the name of a metric or parameter."""
    return re.sub(r"[^\w.\-/ :]", "_", name).strip("/")[:250]


def one_line(error: BaseException) -> str:
    """Return the message of an error of any library, short."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _short(digest: str) -> str:
    """Return the part of a digest that MLflow keeps."""
    return digest.removeprefix("sha256:")[:36]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
