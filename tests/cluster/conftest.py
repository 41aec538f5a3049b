"""The cluster, its registry and the load of the cluster test, which `make test-cluster` runs."""

from collections.abc import Iterator

import pytest

from tests.cluster.harness import Cluster, PodLoad, Transcript, forwarded


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster of KUBECONFIG."""
    with Transcript.opened() as transcript:
        yield Cluster(transcript)


@pytest.fixture(scope="session")
def registry(cluster: Cluster) -> Iterator[str]:
    """Address of the cluster's MLflow, from here; in the environment of every `milonga`."""
    with forwarded(cluster, "service/mlflow", 5000) as address:
        cluster.environment["MLFLOW_TRACKING_URI"] = f"http://{address}"
        yield cluster.environment["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="session")
def load(cluster: Cluster) -> Iterator[PodLoad]:
    """Calls at a constant rate from a pod, until a test stops it."""
    load = PodLoad(cluster)
    load.start()
    yield load
    load.stop()
