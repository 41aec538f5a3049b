"""The calls of the Kubernetes API that `milonga train submit` makes, as plain JSON.

Each docstring names the right that a Role must grant; no other call is made.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar, Final

from training.cluster.namespace import RAW, TIMEOUT_SECONDS, Json, Namespace

FIELD_MANAGER: Final = "milonga-train"
"""Field manager of the Jobs that are created."""
QUIET_SECONDS: Final = 300.0
"""Time without a log line after which the connection counts as dead, and is opened again."""


class Jobs(Namespace):
    """The Jobs of a namespace, with their pods, events and logs."""

    RIGHTS: ClassVar[str] = "docs/training.md"

    def create(self, job: Json, *, dry_run: bool = False) -> Json | None:
        """Create a Job; return it, or None if the namespace does not exist. Role: create of jobs.

        Raises `ConflictError` if the name is taken, `RequestRefusedError` if the manifest is invalid.
        """
        return self._call(
            lambda: self._batch.create_namespaced_job(
                *(self.namespace, job),
                field_manager=FIELD_MANAGER,
                field_validation="Strict",
                **({"dry_run": "All"} if dry_run else {}),
                **RAW,
            )
        )

    def job(self, name: str) -> Json | None:
        """Return a Job, or None if there is none of that name. Role: get of jobs."""
        return self._call(lambda: self._batch.read_namespaced_job(name, self.namespace, **RAW))

    def pods(self, uid: str) -> list[Json]:
        """Return the pods of the Job with this uid, oldest first. Role: list of pods."""
        found = self._found(
            self.title,
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=f"batch.kubernetes.io/controller-uid={uid}", **RAW
            ),
        )
        return sorted(found["items"], key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def warnings(self, uid: str) -> list[Json]:
        """Return the events of type Warning about the object with this uid. Role: list of events."""
        found = self._found(
            self.title,
            lambda: self._core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.uid={uid},type=Warning", **RAW
            ),
        )
        items: list[Json] = found["items"]
        return items

    def log(self, pod: str, container: str, *, follow: bool) -> Iterator[str]:
        """Yield the lines of a container's log, each after its timestamp; with `follow` until it ends.

        Ends early where the connection is lost, and yields nothing where there is no such container. Raises
        as other calls do. Role: get of pods/log.
        """
        seconds = (TIMEOUT_SECONDS[0], QUIET_SECONDS if follow else TIMEOUT_SECONDS[1])
        raw = {**RAW, "_request_timeout": seconds}
        rest = b""
        try:
            response = self._core.read_namespaced_pod_log(
                *(pod, self.namespace), container=container, follow=follow, timestamps=True, **raw
            )
            with closing(response):
                for chunk in response.stream(None):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield line.decode(errors="replace")
        except Exception as error:
            failure = self._explained(error)
            if failure is not None:
                raise failure from error
        if rest:
            yield rest.decode(errors="replace")

    @property
    def _batch(self) -> Any:
        return self._client.BatchV1Api(self._api)
