"""`milonga train submit`: the training Job on a Kubernetes cluster. Light, as every command is.

milonga train submit --recipe align --set dpo.beta=200
milonga train submit --follow align-20260102-030405
kubectl kustomize k8s/overlays/production-jobs | milonga train submit --job -
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.errors import FieldViolation, InvalidInputError, ServiceUnavailableError
from training.exits import exit_codes, timed_lines

if TYPE_CHECKING:
    from training.cluster.jobs import Jobs
    from training.cluster.namespace import Json
    from training.cluster.submit import Asked

EPILOG = (
    "Exit codes: 0 the Job is complete; with --detach or --dry-run, it was taken · 2 wrong input, here or in "
    "the Job · 4 the Job failed · 5 there is a Job of that name · 6 cluster unreachable, or no permission · "
    "130 interrupted: the Job goes on."
)


def submit(
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="As for `milonga train run`.", show_default="the Job's own: align"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a setting; repeatable.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Of the Job; the name of an earlier one, deleted since, goes on with its run.",
            show_default="recipe and time",
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="Of training.", show_default="the Job's own")
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(
            "--job",
            help="File with the Job's manifest, e.g. rendered by kustomize; - for standard input.",
            metavar="FILE",
            show_default="k8s/jobs/align.yaml",
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", help="Of the cluster.", show_default="the Job's: milonga"),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", help="Of kubeconfig.", show_default="the pod's own cluster, else the current one"
        ),
    ] = None,
    followed: Annotated[
        str | None,
        typer.Option("--follow", help="Follow a Job that is there, and submit none.", metavar="NAME"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Don't follow the Job.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Have the cluster check the Job, and make none.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the Job, and ask no cluster.")] = False,
) -> None:
    """Submit the training Job to a Kubernetes cluster, and follow it: what it waits for, its log, its end.

    A pod that is lost is replaced, and the run goes on from its last checkpoint.

    Ctrl-C leaves the Job to itself.
    """
    from training.cluster.submit import EXIT_CODES, NAMESPACE, Asked, create, find, ways_on

    with exit_codes(EXIT_CODES):
        if followed is not None:
            others = (recipe, settings, name, image, job, detach, dry_run, show)
            if any(others):
                raise InvalidInputError(
                    FieldViolation("--follow", "takes --namespace and --context, no more")
                )
            jobs = _jobs(namespace or NAMESPACE, context)
            _follow(jobs, find(jobs, followed), context)
            return
        asked = Asked(recipe=recipe, settings=settings or (), name=name, image=image, namespace=namespace)
        manifest = _checked(job, asked)
        if show:
            import yaml  # type: ignore[import-untyped]

            typer.echo(yaml.safe_dump(manifest, sort_keys=False, width=120), nl=False)
            return
        where, called = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        jobs = _jobs(where, context)
        made = create(jobs, manifest, dry_run=dry_run, context=context)
        if dry_run:
            typer.echo(f"{jobs.where} would take the Job {called} in the namespace {where}")
        elif detach:
            typer.echo(f"the Job {called} is in the namespace {where}; {ways_on(called, where, context)}")
        else:
            typer.echo(f"the Job {called} is in the namespace {where}; Ctrl-C leaves it to itself", err=True)
            _follow(jobs, made, context)


def _checked(place: Path | None, asked: "Asked") -> "Json":
    """The Job to send. What the pod would refuse is refused here, in the same words."""
    from training.cluster.submit import filled_in, read_manifest, recipe_and_settings
    from training.commands.run import configured

    manifest = read_manifest(place, sys.stdin)
    configured(*recipe_and_settings(manifest, asked))
    return filled_in(manifest, asked)


def _jobs(namespace: str, context: str | None) -> "Jobs":
    from training.cluster.jobs import Jobs
    from training.cluster.namespace import connect

    return connect(Jobs, namespace, context)


def _follow(jobs: "Jobs", job: "Json", context: str | None) -> None:
    """Follow a Job. Whatever ends that but its own end leaves it as it is, and says so."""
    from training.cluster.following import follow
    from training.cluster.submit import ways_on

    name = job["metadata"]["name"]
    ways = ways_on(name, jobs.namespace, context)
    try:
        follow(jobs, job, tell=timed_lines(), write=typer.echo)
    except KeyboardInterrupt as error:
        typer.echo(f"the Job {name} goes on; {ways}", err=True)
        raise typer.Exit(130) from error
    except ServiceUnavailableError as error:
        raise ServiceUnavailableError(f"{error}; the Job {name} is not touched by that; {ways}") from error
