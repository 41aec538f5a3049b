"""The training Job: its manifest, overridden by the command's options, and its creation.

The manifest is `k8s/jobs/align.yaml`, which `kubectl create -f` accepts unchanged, or the user's own file.
"""

import datetime
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TextIO

from services.errors import InvalidInputError, MilongaError, invalid
from training.cluster.following import JobFailedError
from training.cluster.jobs import Jobs
from training.cluster.namespace import EXIT_CODES as CLUSTER_EXIT_CODES
from training.cluster.namespace import ConflictError, Json, RequestRefusedError
from training.cluster.pods import condition
from training.exits import ExitCodes

JOB: Final = "align"
"""Name of the Job that is taken where a manifest holds several."""
NAMESPACE: Final = "milonga"
"""Default namespace."""
SUBMISSION: Final = "milonga.dev/submission"
"""Annotation of a Job: a random token per submission, which identifies a Job that this process created."""

# In a wheel next to this module, in the repository among the other manifests.
_PATHS: Final = (
    Path(__file__).with_name("align.yaml"),
    Path(__file__).parents[2] / "k8s" / "jobs" / "align.yaml",
)
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_COMMAND: Final = ["train", "run"]


class JobExistsError(MilongaError):
    """A Job of that name exists."""


EXIT_CODES: Final[ExitCodes] = MappingProxyType({**CLUSTER_EXIT_CODES, JobFailedError: 4, JobExistsError: 5})
"""Exit code of `milonga train submit` by error class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOverrides:
    """Values that replace those of a Job's manifest."""

    recipe: str | None = None
    """Recipe of the run; None: the manifest's."""
    settings: Sequence[str] = ()
    """Settings ``NAME=VALUE``, appended to the manifest's: the last of several for one name holds."""
    name: str | None = None
    """Name of the Job, and of the run's folder on its volume. None: recipe and time."""
    image: str | None = None
    """Image of the container; None: the manifest's."""
    namespace: str | None = None
    """Kubernetes namespace; None: the manifest's."""


def read_manifest(path: Path | None, stdin: TextIO) -> Json:
    """Return the Job of the file `path`, of `stdin` where that is ``-``, or of `k8s/jobs/align.yaml`.

    Raises `InvalidInputError` if there is no training Job, or more than one.
    """
    import yaml  # type: ignore[import-untyped]

    if path is None:
        path = next((one for one in _PATHS if one.exists()), _PATHS[0])
    where = "standard input" if str(path) == "-" else str(path)
    try:
        text = stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        objects = [one for one in yaml.safe_load_all(text) if isinstance(one, dict)]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _invalid_manifest(f"{where} can't be read: {' '.join(str(error).split())[:200]}") from error
    found = {_name(one): one for one in objects if one.get("kind") == "Job"}
    job = next(iter(found.values())) if len(found) == 1 else found.get(JOB)
    if job is None:
        names = ", ".join(found) or "none"
        raise _invalid_manifest(f"{where} has the Jobs {names}; expected exactly one, or one named {JOB}")
    _arguments(job)
    return job


def recipe_and_settings(job: Mapping[str, Any], overrides: JobOverrides) -> tuple[str, list[str]]:
    """Return the recipe and the settings that the Job passes to `milonga train run`."""
    own = _values(_arguments(job), "--recipe")
    return overrides.recipe or (own or ["mini"])[-1], [
        *_values(_arguments(job), "--set"),
        *overrides.settings,
    ]


def with_overrides(job: Json, overrides: JobOverrides) -> Json:
    """Return a copy of the manifest `job` with the overrides, a name and a submission token.

    Raises `InvalidInputError` for an invalid name.
    """
    recipe, _ = recipe_and_settings(job, overrides)
    now = datetime.datetime.now(datetime.UTC)
    name = overrides.name or f"{recipe}-{now:%Y%m%d-%H%M%S}"
    if not _NAME.fullmatch(name):
        raise invalid(
            "--name", f"is {name[:80]!r}, must be of lowercase letters, digits and -, at most 63 of them"
        )
    given = job.get("metadata") or {}
    metadata = {key: value for key, value in given.items() if key != "generateName"}
    metadata |= {
        "name": name,
        "namespace": overrides.namespace or metadata.get("namespace", NAMESPACE),
        "annotations": {**(metadata.get("annotations") or {}), SUBMISSION: secrets.token_hex(8)},
    }
    template = job["spec"]["template"]
    first, *others = template["spec"]["containers"]
    # $(NAME) would be expanded by the kubelet.
    settings = [f"--set={one.replace('$(', '$$(')}" for one in overrides.settings]
    args = [*_COMMAND, f"--recipe={recipe}", *_without_recipe(_arguments(job)), *settings]
    first = {**first, "args": args, **({"image": overrides.image} if overrides.image else {})}
    pod = {**template["spec"], "containers": [first, *others]}
    return {**job, "metadata": metadata, "spec": {**job["spec"], "template": {**template, "spec": pod}}}


def create(jobs: Jobs, job: Json, *, dry_run: bool = False, context: str | None = None) -> Json:
    """Create the Job, and return it as the API server does. `context` appears in error messages only.

    Raises:
        InvalidInputError: the namespace does not exist, or the API server refuses the manifest.
        JobExistsError: another Job has that name.
        ServiceUnavailableError: the cluster does not answer, or does not permit it.
    """
    name = job["metadata"]["name"]
    try:
        made = jobs.create(job, dry_run=dry_run)
    except ConflictError as error:
        there = jobs.job(name)
        if there is not None and _submission(there) == _submission(job):
            return there  # created by our first request, whose answer was lost
        raise JobExistsError(
            f"the Job {name} exists in the namespace {jobs.namespace} already{_state(there)}; "
            f"{next_steps(name, jobs.namespace, context)}; or give another --name"
        ) from error
    except RequestRefusedError as error:
        raise _invalid_manifest(f"is refused by {jobs.where}: {error.reason}") from error
    if made is None:
        raise invalid(
            "--namespace",
            f"is {jobs.namespace}, and {jobs.where} has no such namespace; give another, or apply the "
            "manifests: kubectl apply -f k8s/",
        )
    return made


def find(jobs: Jobs, name: str) -> Json:
    """Return the Job of that name. Raises `InvalidInputError` if there is none."""
    job = jobs.job(name)
    if job is None:
        raise invalid(
            "--follow",
            f"is {name}, and there is no such Job in the namespace {jobs.namespace} of {jobs.where}; see "
            f"kubectl --namespace {jobs.namespace} get jobs",
        )
    return job


def next_steps(name: str, namespace: str, context: str | None = None) -> str:
    """Return the commands that follow and delete a Job, for messages."""
    ours = "" if namespace == NAMESPACE else f" --namespace {namespace}"
    there = f" --context {context}" if context else ""
    return (
        f"to follow it: milonga train submit --follow {name}{ours}{there}; to delete it: kubectl{there} "
        f"--namespace {namespace} delete job {name}"
    )


def _arguments(job: Mapping[str, Any]) -> list[str]:
    """Return the arguments of the Job's container. Raises `InvalidInputError` unless it runs `train run`."""
    try:
        args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    except (KeyError, IndexError, TypeError):
        args = None
    words = [str(word) for word in args] if isinstance(args, list) else []
    if words[:2] != _COMMAND:
        raise _invalid_manifest(
            f"has the Job {_name(job)} with the arguments {' '.join(words[:3]) or 'of its image'}; "
            f"expected {' '.join(_COMMAND)}"
        )
    return words


def _values(words: Sequence[str], flag: str) -> list[str]:
    """Return the values of a flag, given as ``--flag=VALUE`` or as two words."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [
        after if word == flag else word.removeprefix(f"{flag}=") for word, after in pairs if _is(word, flag)
    ]


def _without_recipe(words: Sequence[str]) -> list[str]:
    """Return the arguments after the command, without the recipe."""
    rest = iter(words[len(_COMMAND) :])
    kept = []
    for word in rest:
        if word == "--recipe":
            next(rest, None)
        elif not _is(word, "--recipe"):
            kept.append(word)
    return kept


def _is(word: str, flag: str) -> bool:
    return word == flag or word.startswith(f"{flag}=")


def _state(job: Json | None) -> str:
    if job is None:
        return ""
    ends = {"Complete": "complete", "Failed": "failed"}
    done = [text for kind, text in ends.items() if condition(job, kind).get("status") == "True"]
    return f" ({done[0] if done else 'not over'})"


def _submission(job: Json) -> str | None:
    found: str | None = (job["metadata"].get("annotations") or {}).get(SUBMISSION)
    return found


def _name(job: Mapping[str, Any]) -> str:
    return str((job.get("metadata") or {}).get("name") or "without name")


def _invalid_manifest(description: str) -> InvalidInputError:
    return invalid("--job", description)
