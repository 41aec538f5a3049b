"""The few calls of the Kubernetes API that `milonga train submit` makes, as plain JSON.

What a Role must allow stands with each; nothing else is called.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar, Final

from training.cluster.namespace import RAW, TIMEOUT_SECONDS, Json, Namespace

FIELD_MANAGER: Final = "milonga-train"
"""Who made a Job, among the fields' managers."""
QUIET_SECONDS: Final = 300.0
"""How long a container may write nothing before its log is asked for anew: the connection may be dead."""


class Jobs(Namespace):
    """The Jobs of a namespace, and what becomes of them."""

    RIGHTS: ClassVar[str] = "docs/training.md"

    def create(self, job: Json, *, dry_run: bool = False) -> Json | None:
        """Make a Job; None where there is no such namespace. Role: create of jobs.

        Raises `ConflictError` where there is one of that name, `RequestRefusedError` where it is none.
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
        """A Job; None where there is none. Role: get of jobs."""
        return self._call(lambda: self._batch.read_namespaced_job(name, self.namespace, **RAW))

    def pods(self, uid: str) -> list[Json]:
        """The pods of the Job with this uid, oldest first. Role: list of pods."""
        found = self._found(
            self.title,
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=f"batch.kubernetes.io/controller-uid={uid}", **RAW
            ),
        )
        return sorted(found["items"], key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def warnings(self, uid: str) -> list[Json]:
        """Events of type Warning about the object with this uid. Role: list of events."""
        found = self._found(
            self.title,
            lambda: self._core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.uid={uid},type=Warning", **RAW
            ),
        )
        items: list[Json] = found["items"]
        return items

    def log(self, pod: str, container: str, *, follow: bool) -> Iterator[str]:
        """The lines that a container has written, each after its time; with `follow` to its end.

        They end early where the connection does. Role: get of pods/log. Raises as other calls do, for what is
        not there nothing.
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
