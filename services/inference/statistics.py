"""Statistics for ModelStatistics: requests of this protocol, by version of the weights."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from tritonclient.grpc import service_pb2 as pb

from services.inference.model import Response, Stages

_STAGES = tuple(stage.name for stage in fields(Stages))


@dataclass(slots=True)
class _Counts:
    """Counts of one version. Times are in seconds."""

    rows: int = 0
    succeeded: int = 0
    failed: int = 0
    success_seconds: float = 0.0
    fail_seconds: float = 0.0
    last_milliseconds: int = 0
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_STAGES, 0.0))


@dataclass(slots=True)
class RequestRecord:
    """Rows and stages of one running request."""

    rows: int = 0
    stages: Stages | None = None

    def add(self, response: Response) -> None:
        """Add a response's rows and stages."""
        self.rows += response.rows
        self.stages = response.stages or self.stages


class Statistics:
    """Counts the requests to one model since the service's start. Belongs to one event loop."""

    def __init__(self) -> None:
        self._versions: dict[str, _Counts] = {}

    @contextmanager
    def measure(self, version: str) -> Iterator[RequestRecord]:
        """Count one request; if the context raises, or is cancelled, as failed."""
        start, record = time.monotonic(), RequestRecord()
        counts = self._versions.setdefault(version, _Counts())
        try:
            yield record
        except BaseException:
            counts.failed += 1
            counts.fail_seconds += time.monotonic() - start
            raise
        counts.succeeded += 1
        counts.success_seconds += time.monotonic() - start
        counts.rows += record.rows
        counts.last_milliseconds = round(time.time() * 1000)
        for stage in _STAGES:
            counts.stages[stage] += getattr(record.stages or Stages(), stage)

    def messages(self, name: str, served: str) -> Iterator[pb.ModelStatistics]:
        """Yield the statistics of model `name`: of the `served` version, and of earlier ones."""
        for version, counts in ({served: _Counts()} | self._versions).items():
            yield pb.ModelStatistics(
                name=name,
                version=version,
                last_inference=counts.last_milliseconds,
                inference_count=counts.rows,
                execution_count=counts.succeeded,
                inference_stats=pb.InferStatistics(
                    success=_duration(counts.succeeded, counts.success_seconds),
                    fail=_duration(counts.failed, counts.fail_seconds),
                    **{stage: _duration(counts.succeeded, counts.stages[stage]) for stage in _STAGES},
                ),
            )


def _duration(count: int, seconds: float) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=round(seconds * 1e9))
