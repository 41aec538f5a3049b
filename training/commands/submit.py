"""`milonga train submit`: the training Job on a Kubernetes cluster.

milonga train submit --recipe align --set dpo.beta=200
milonga train submit --follow align-20260102-030405
kubectl kustomize k8s/overlays/production-jobs | milonga train submit --job -
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import grouped
from services.errors import ServiceUnavailableError, invalid
from training.commands.options import Settings
from training.exits import exit_codes, timed_lines

if TYPE_CHECKING:
    from training.cluster.jobs import Jobs
    from training.cluster.namespace import Json

EPILOG = (
    "Exit codes: 0 the Job is complete; with --detach or --dry-run, accepted · 1 a bug, or something is not "
    "installed · 2 wrong input, here or in the Job · 4 the Job failed · 5 a Job of that name exists · "
    "6 cluster unreachable, or no permission · 130 interrupted: the Job keeps running."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """Options that choose the Job, and what to do with it."""

    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="As for `milonga train run`.", show_default="the manifest's: align"),
    ] = None
    settings: Settings = None
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Name of the Job; that of an earlier Job, since deleted, resumes its run.",
            show_default="recipe and time",
        ),
    ] = None
    image: Annotated[
        str | None, typer.Option("--image", help="Training image.", show_default="the manifest's")
    ] = None
    job: Annotated[
        Path | None,
        typer.Option(
            "--job",
            help="Manifest of the Job, e.g. rendered by kustomize; - for standard input.",
            metavar="FILE",
            show_default="k8s/jobs/align.yaml",
        ),
    ] = None
    detach: Annotated[bool, typer.Option("--detach", help="Don't follow the Job.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Have the cluster validate the Job, and create none.")
    ] = False
    show: Annotated[bool, typer.Option("--show", help="Print the Job, and call no cluster.")] = False


@grouped
def submit(
    *,
    options: SubmitOptions,
    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace", "-n", help="Kubernetes namespace.", show_default="the manifest's: milonga"
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            help="Context of kubeconfig.",
            show_default="the pod's own cluster, else the current one",
        ),
    ] = None,
    followed: Annotated[
        str | None,
        typer.Option("--follow", help="Follow an existing Job, and submit none.", metavar="NAME"),
    ] = None,
) -> None:
    """Submit the training Job to a Kubernetes cluster, and follow it: what it waits for, its log, its end.

    A pod that is lost is replaced, and the run resumes from its last checkpoint.

    Ctrl-C stops following; the Job keeps running.
    """
    from training.cluster.submit import EXIT_CODES, NAMESPACE, create, find, next_steps

    with exit_codes(EXIT_CODES):
        if followed is not None:
            if options != SubmitOptions():
                raise invalid("--follow", "excludes all options but --namespace and --context")
            jobs = _jobs(namespace or NAMESPACE, context)
            _follow(jobs, find(jobs, followed), context)
            return
        manifest = _manifest(options, namespace)
        if options.show:
            import yaml  # type: ignore[import-untyped]

            typer.echo(yaml.safe_dump(manifest, sort_keys=False, width=120), nl=False)
            return
        space, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        jobs = _jobs(space, context)
        created = create(jobs, manifest, dry_run=options.dry_run, context=context)
        if options.dry_run:
            typer.echo(f"{jobs.where} would accept the Job {name} in the namespace {space}")
        elif options.detach:
            typer.echo(
                f"the Job {name} is created in the namespace {space}; {next_steps(name, space, context)}"
            )
        else:
            typer.echo(
                f"the Job {name} is created in the namespace {space}; it keeps running after Ctrl-C", err=True
            )
            _follow(jobs, created, context)


def _manifest(options: SubmitOptions, namespace: str | None) -> "Json":
    """Return the Job to send. Raises `InvalidInputError` for the errors that the pod would report."""
    from training.cluster.submit import JobOverrides, read_manifest, recipe_and_settings, with_overrides
    from training.commands.run import configured

    overrides = JobOverrides(
        recipe=options.recipe,
        settings=options.settings or (),
        name=options.name,
        image=options.image,
        namespace=namespace,
    )
    manifest = read_manifest(options.job, sys.stdin)
    configured(*recipe_and_settings(manifest, overrides))
    return with_overrides(manifest, overrides)


def _jobs(namespace: str, context: str | None) -> "Jobs":
    from training.cluster.jobs import Jobs
    from training.cluster.namespace import connect

    return connect(Jobs, namespace, context)


def _follow(jobs: "Jobs", job: "Json", context: str | None) -> None:
    """Follow a Job. On Ctrl-C and lost connections, say how to continue: the Job itself is left alone."""
    from training.cluster.following import follow
    from training.cluster.submit import next_steps

    name = job["metadata"]["name"]
    steps = next_steps(name, jobs.namespace, context)
    try:
        follow(jobs, job, report=timed_lines(), write=typer.echo)
    except KeyboardInterrupt as error:
        typer.echo(f"the Job {name} keeps running; {steps}", err=True)
        raise typer.Exit(130) from error
    except ServiceUnavailableError as error:
        raise ServiceUnavailableError(f"{error}; the Job {name} is unaffected; {steps}") from error
