"""The flags that name a promotion target, and the target that they name."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import CONNECTION_PANEL, check_address
from services.client import ServiceOptions
from services.errors import InvalidInputError, invalid
from training.exits import timed_lines
from training.loop.checks import Range, check_ranges

if TYPE_CHECKING:
    from training.promotion.registry import Registry
    from training.promotion.target import Target

TrackingURI = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        help="MLflow server or database.",
        show_default="MLFLOW_TRACKING_URI, else ./mlflow.db",
        rich_help_panel=CONNECTION_PANEL,
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetOptions:
    """Options that choose the target, its connection and its deadline."""

    target: Annotated[
        str,
        typer.Option("--target", help="Target: kubernetes, local, or triton://HOST:PORT.", metavar="TARGET"),
    ] = "kubernetes"
    repository: Annotated[
        str | None,
        typer.Option(
            "--repository",
            help="Triton's model repository: a folder, or s3://…",
            metavar="PLACE",
            show_default=False,
        ),
    ] = None
    deadline: Annotated[
        float,
        typer.Option("--deadline", help="Seconds that challenger and rollout may each take."),
        Range(1, 10**6),
    ] = 600.0
    namespace: Annotated[
        str,
        typer.Option("--namespace", "-n", help="Kubernetes namespace.", rich_help_panel=CONNECTION_PANEL),
    ] = "milonga"
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            help="Context of kubeconfig.",
            show_default="the pod's own cluster, else the current one",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None
    generation_address: Annotated[
        str | None,
        typer.Option(
            "--generation-address",
            help="Address of the generation service. Kubernetes: verified in addition to each pod.",
            metavar="ADDR",
            show_default="in a pod the Service; local: 127.0.0.1:50051",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None
    challenger_address: Annotated[
        str | None,
        typer.Option(
            "--challenger-address",
            help="Address of the challenger on Kubernetes.",
            metavar="ADDR",
            show_default="its pod, from outside through the API server",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None
    operator_token_file: Annotated[
        Path | None,
        typer.Option(
            "--operator-token-file",
            help="Operator token of the local service, or of a Triton that restricts loading.",
            show_default="local: MILONGA_OPERATOR_TOKEN_FILE, MILONGA_OPERATOR_TOKEN",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None
    tracking_uri: TrackingURI = None

    def __post_init__(self) -> None:
        check_ranges(self)


def open_target(options: TargetOptions, connection: ServiceOptions, registry: "Registry") -> "Target":
    """Return the target that `options` name. Raises `InvalidInputError` if they name none."""
    kind = options.target
    check_address("--generation-address", options.generation_address)
    check_address("--challenger-address", options.challenger_address)
    if kind.startswith("triton://"):
        from services.inference.triton.repository import ModelRepository, open_storage
        from training.promotion.targets.triton import TritonTarget

        if options.repository is None:
            raise invalid("--repository", "is missing; give the model repository that the Triton reads")
        file = options.operator_token_file
        token = "" if file is None else _operator_token(file)
        models = ModelRepository(open_storage(options.repository))
        return TritonTarget(_triton_address(kind), models, registry, tls=connection.files, token=token)
    if options.repository is not None:
        raise invalid("--repository", f"is for Triton, and --target is {kind}; give triton://HOST:PORT")
    if kind == "local":
        from training.promotion.targets.local import LocalTarget

        address = options.generation_address or "127.0.0.1:50051"
        token = _operator_token(options.operator_token_file)
        return LocalTarget(address, registry, token=token, connection=connection)
    if kind != "kubernetes":
        raise _no_target(kind)
    from training.cluster.namespace import in_cluster
    from training.promotion.targets.cluster import connect_cluster
    from training.promotion.targets.kubernetes import KubernetesTarget

    return KubernetesTarget(
        connect_cluster(options.namespace, options.context),
        report=timed_lines(),
        inside=options.context is None and in_cluster(),
        connection=connection,
        generation_address=options.generation_address,
        challenger_address=options.challenger_address,
    )


def _triton_address(target: str) -> str:
    """Return HOST:PORT of ``triton://HOST:PORT``. Raises `InvalidInputError`."""
    found = re.fullmatch(r"triton://((?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?)/?", target)
    if found is None:
        raise _no_target(target)
    return found[1]


def _no_target(target: str) -> InvalidInputError:
    return invalid("--target", f"is {target!r}, must be kubernetes, local or triton://HOST:PORT")


def _operator_token(file: Path | None) -> str:
    """Return the operator token of `file` or the environment. Raises `InvalidInputError` if there is none."""
    named = os.environ.get("MILONGA_OPERATOR_TOKEN_FILE")
    path = file or (Path(named) if named else None)
    try:
        text = os.environ.get("MILONGA_OPERATOR_TOKEN", "") if path is None else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("--operator-token-file", f"{path} can't be read: {error}") from error
    if not text.strip():
        raise invalid(
            "--operator-token-file",
            "is missing; start the service with MILONGA_OPERATOR_TOKEN_FILE and give the same file here",
        )
    return text.strip()
