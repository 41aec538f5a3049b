"""The training Job: its manifest, with the recipe and the settings that were asked for, and its creation.

The manifest is `k8s/jobs/align.yaml`, which `kubectl create -f` takes as well, or a file of the user's own.
"""

import datetime
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TextIO

from services.errors import FieldViolation, InvalidInputError, MilongaError
from training.cluster.following import JobFailedError
from training.cluster.jobs import Jobs
from training.cluster.namespace import EXIT_CODES as CLUSTER_EXIT_CODES
from training.cluster.namespace import ConflictError, Json, RequestRefusedError
from training.cluster.pods import condition
from training.exits import ExitCodes

JOB: Final = "align"
"""Which of several Jobs is meant."""
NAMESPACE: Final = "milonga"
"""Of a manifest that names none."""
SUBMISSION: Final = "milonga.dev/submission"
"""Annotation of a Job: which submission made it."""

# Beside this module in a wheel, among the other manifests in the repository.
_PLACES: Final = (
    Path(__file__).with_name("align.yaml"),
    Path(__file__).parents[2] / "k8s" / "jobs" / "align.yaml",
)
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_COMMAND: Final = ["train", "run"]


class JobExistsError(MilongaError):
    """There is a Job of that name."""


EXIT_CODES: Final[ExitCodes] = MappingProxyType({**CLUSTER_EXIT_CODES, JobFailedError: 4, JobExistsError: 5})
"""Exit code of `milonga train submit` by error: those of `training.cluster.namespace`, and its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a Job is to run, as far as its manifest does not say it already."""

    recipe: str | None = None
    """None: the manifest's."""
    settings: Sequence[str] = ()
    """``NAME=VALUE``, after those of the manifest: of two for one name the last holds."""
    name: str | None = None
    """Of the Job, and of the run's folder on its volume. None: recipe and time."""
    image: str | None = None
    """None: the manifest's."""
    namespace: str | None = None
    """None: the manifest's."""


def read_manifest(place: Path | None, stdin: TextIO) -> Json:
    """The Job in the file `place`, in `stdin` where that is ``-``, or else the training Job as it is.

    Raises `InvalidInputError` where there is none, or none that could be meant.
    """
    import yaml  # type: ignore[import-untyped]

    path = next((one for one in _PLACES if one.exists()), _PLACES[0]) if place is None else place
    where = "standard input" if str(path) == "-" else str(path)
    try:
        text = stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        objects = [one for one in yaml.safe_load_all(text) if isinstance(one, dict)]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _wrong(f"{where} can't be read: {' '.join(str(error).split())[:200]}") from error
    found = {_name(one): one for one in objects if one.get("kind") == "Job"}
    job = next(iter(found.values())) if len(found) == 1 else found.get(JOB)
    if job is None:
        names = ", ".join(found) or "none"
        raise _wrong(f"{where} holds the Jobs {names}; expected one of them, or one that is called {JOB}")
    _arguments(job)
    return job


def recipe_and_settings(job: Mapping[str, Any], asked: Asked) -> tuple[str, list[str]]:
    """What the Job will be run with: as `milonga train run` gets it."""
    own = _values(_arguments(job), "--recipe")
    return asked.recipe or (own or ["mini"])[-1], [*_values(_arguments(job), "--set"), *asked.settings]


def filled_in(job: Json, asked: Asked) -> Json:
    """The Job as it is sent. `job` is left as it was.

    Raises `InvalidInputError` for a name that can't be one.
    """
    recipe, _ = recipe_and_settings(job, asked)
    now = datetime.datetime.now(datetime.UTC)
    name = asked.name or f"{recipe}-{now:%Y%m%d-%H%M%S}"
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            FieldViolation(
                "--name", f"is {name[:80]!r}, must be of lowercase letters, digits and -, at most 63 of them"
            )
        )
    given = job.get("metadata") or {}
    metadata = {key: value for key, value in given.items() if key != "generateName"}
    metadata |= {
        "name": name,
        "namespace": asked.namespace or metadata.get("namespace", NAMESPACE),
        "annotations": {**(metadata.get("annotations") or {}), SUBMISSION: secrets.token_hex(8)},
    }
    template = job["spec"]["template"]
    first, *others = template["spec"]["containers"]
    # Else the kubelet would put in what it knows by that name.
    settings = [f"--set={one.replace('$(', '$$(')}" for one in asked.settings]
    args = [*_COMMAND, f"--recipe={recipe}", *_without_recipe(_arguments(job)), *settings]
    first = {**first, "args": args, **({"image": asked.image} if asked.image else {})}
    pod = {**template["spec"], "containers": [first, *others]}
    return {**job, "metadata": metadata, "spec": {**job["spec"], "template": {**template, "spec": pod}}}


def create(jobs: Jobs, job: Json, *, dry_run: bool = False, context: str | None = None) -> Json:
    """Make the Job, and return it as it now is. `context` is for what is said.

    Raises:
        InvalidInputError: there is no such namespace, or the API server refuses the manifest.
        JobExistsError: another one has that name.
        ServiceUnavailableError: the cluster does not answer, or does not let us.
    """
    name = job["metadata"]["name"]
    try:
        made = jobs.create(job, dry_run=dry_run)
    except ConflictError as error:
        there = jobs.job(name)
        if there is not None and _submission(there) == _submission(job):
            return there  # ours: the answer got lost, and we asked again
        raise JobExistsError(
            f"the Job {name} is in the namespace {jobs.namespace} already{_state(there)}; "
            f"{ways_on(name, jobs.namespace, context)}; or give another --name"
        ) from error
    except RequestRefusedError as error:
        raise _wrong(f"is refused by {jobs.where}: {error.reason}") from error
    if made is None:
        raise InvalidInputError(
            FieldViolation(
                "--namespace",
                f"is {jobs.namespace}, and {jobs.where} has none of that name; give another, or apply the "
                "manifests: kubectl apply -f k8s/",
            )
        )
    return made


def find(jobs: Jobs, name: str) -> Json:
    """A Job that is there. Raises `InvalidInputError` where it is not."""
    job = jobs.job(name)
    if job is None:
        raise InvalidInputError(
            FieldViolation(
                "--follow",
                f"is {name}, and there is no such Job in the namespace {jobs.namespace} of {jobs.where}; see "
                f"kubectl --namespace {jobs.namespace} get jobs",
            )
        )
    return job


def ways_on(name: str, namespace: str, context: str | None = None) -> str:
    """How to follow a Job, and how to be rid of it."""
    ours = "" if namespace == NAMESPACE else f" --namespace {namespace}"
    there = f" --context {context}" if context else ""
    return (
        f"to follow it: milonga train submit --follow {name}{ours}{there}; to delete it: kubectl{there} "
        f"--namespace {namespace} delete job {name}"
    )


def _arguments(job: Mapping[str, Any]) -> list[str]:
    """The arguments of the Job's container. Raises `InvalidInputError` where it runs something else."""
    try:
        args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    except (KeyError, IndexError, TypeError):
        args = None
    words = [str(word) for word in args] if isinstance(args, list) else []
    if words[:2] != _COMMAND:
        raise _wrong(
            f"holds the Job {_name(job)} with the arguments {' '.join(words[:3]) or 'of its image'}; "
            f"expected {' '.join(_COMMAND)}"
        )
    return words


def _values(words: Sequence[str], flag: str) -> list[str]:
    """The values of a flag: ``--flag=VALUE``, or in two words."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [
        after if word == flag else word.removeprefix(f"{flag}=") for word, after in pairs if _is(word, flag)
    ]


def _without_recipe(words: Sequence[str]) -> list[str]:
    """The arguments after the command, without the recipe."""
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
    return f" ({done[0] if done else 'not over yet'})"


def _submission(job: Json) -> str | None:
    found: str | None = (job["metadata"].get("annotations") or {}).get(SUBMISSION)
    return found


def _name(job: Mapping[str, Any]) -> str:
    return str((job.get("metadata") or {}).get("name") or "without a name")


def _wrong(description: str) -> InvalidInputError:
    return InvalidInputError(FieldViolation("--job", description))
