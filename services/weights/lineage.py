"""The runs that made and promoted a registered version, for the manifests of signed clips."""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Final

from services.api.model import ModelVersion
from services.errors import MilongaError
from services.weights.registry import DIGEST_TAG, connect

LEDGER_RUN_TAG: Final = "milonga.promotion.run"
"""Tag of a registered version: the ledger's run of its last promotion."""
RETRY_SECONDS: Final = 60.0
"""Time after which unknown runs are asked for again: a version is promoted after its first clips."""

log = logging.getLogger(__name__)


class Lineage:
    """Looks runs up in MLflow's registry, once per version. Thread-safe."""

    def __init__(self, uri: str) -> None:
        """`uri` is that of the MLflow server."""
        self._uri = uri
        self._known: dict[str, tuple[Mapping[str, str], float]] = {}
        self._lock = threading.Lock()

    def __call__(self, model: ModelVersion) -> Mapping[str, str]:
        """Return ``training_run`` and ``ledger_run`` of a version, as far as they are known.

        A registry that is away delays no further clip: it is asked again after a minute.
        """
        with self._lock:
            found, asked = self._known.get(model.digest, ({}, float("-inf")))
            if "ledger_run" in found or time.monotonic() - asked < RETRY_SECONDS:
                return found
            try:
                found = self._look_up(model)
            except MilongaError as error:
                log.warning("the runs of %s %s are unknown: %s", model.name, model.version, error)
            self._known[model.digest] = (found, time.monotonic())
            return found

    def _look_up(self, model: ModelVersion) -> Mapping[str, str]:
        client = connect(self._uri)
        from mlflow.exceptions import MlflowException

        try:
            version = client.get_model_version(model.name, model.version)
        except MlflowException:
            return {}  # a model that is not registered, or not under this name
        if version.tags.get(DIGEST_TAG) != model.digest:
            return {}
        runs = {"training_run": version.run_id, "ledger_run": version.tags.get(LEDGER_RUN_TAG)}
        return {name: run for name, run in runs.items() if run}
