"""`milonga promote`. Light, so that the command line starts without torch.

milonga promote --model milonga-tango --version 7
milonga promote --rollback
milonga promote --target triton://HOST:8001 --repository PATH --version 7
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from services.errors import FieldViolation, InvalidInputError
from training.exits import exit_codes, timed_lines
from training.promotion.errors import EXIT_CODES

if TYPE_CHECKING:
    from services.client import TLS
    from training.promotion.promote import Done
    from training.promotion.registry import Registry, Version
    from training.promotion.target import Target

EPILOG = (
    "Exit codes: 0 done · 2 wrong input, or the model was refused · 3 the gates refused · 4 it did not come "
    "up, and was rolled back · 5 another promotion runs, or was left unfinished · 6 cluster, registry or "
    "service unreachable, or no permission · 7 the rollback failed: needs a person · 8 done, but the ledger "
    "was not told · 130 interrupted, and rolled back."
)
_PROGRESS, _REACHING = "Gates and deadlines", "Reaching things"

promote = typer.Typer(help="Roll new weights through gates into the service, and back if they fail.")


@promote.callback(invoke_without_command=True, epilog=EPILOG, no_args_is_help=True)
def run(
    model: Annotated[str, typer.Option("--model", help="Registered model.")] = "milonga-tango",
    version: Annotated[
        str | None,
        typer.Option("--version", help="Its version.", show_default="the one with the alias challenger"),
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Serve again what was served before.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Finish or undo a promotion whose promoter died.")
    ] = False,
    history: Annotated[bool, typer.Option("--history", help="Print the ledger, newest first.")] = False,
    bootstrap: Annotated[
        str | None,
        typer.Option(
            "--bootstrap",
            help="Pin what has no pin yet: a model URI or folder, registered if it is not.",
            metavar="URI_OR_FOLDER",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target", help="What serves: kubernetes, local, or triton://HOST:PORT.", metavar="TARGET"
        ),
    ] = "kubernetes",
    repository: Annotated[
        str | None,
        typer.Option(
            "--repository",
            help="The model repository that the Triton reads: a folder, or s3://…",
            metavar="PLACE",
            show_default=False,
        ),
    ] = None,
    gates: Annotated[
        Path | None,
        typer.Option(
            "--gates",
            help="File of gates.",
            show_default="gates-mini.toml, for the mini family",
            rich_help_panel=_PROGRESS,
        ),
    ] = None,
    deadline: Annotated[
        float,
        typer.Option(
            "--deadline",
            min=1,
            help="Seconds that challenger and rollout may each take.",
            rich_help_panel=_PROGRESS,
        ),
    ] = 600.0,
    alias: Annotated[
        str, typer.Option("--alias", help="That says what is served here.", rich_help_panel=_PROGRESS)
    ] = "champion",
    scoring: Annotated[
        str | None,
        typer.Option(
            "--scoring",
            help="Address of a scoring service, instead of scorers in this process.",
            metavar="ADDR",
            rich_help_panel=_PROGRESS,
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward-server",
            help="Address of a reward service, likewise.",
            metavar="ADDR",
            rich_help_panel=_PROGRESS,
        ),
    ] = None,
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Of the cluster.", rich_help_panel=_REACHING)
    ] = "milonga",
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            help="Of kubeconfig.",
            show_default="the pod's own cluster, else the current one",
            rich_help_panel=_REACHING,
        ),
    ] = None,
    generation_address: Annotated[
        str | None,
        typer.Option(
            "--generation-address",
            help="Of the service. Kubernetes: asked as well, beside each pod.",
            metavar="ADDR",
            show_default="in a pod the Service; local: 127.0.0.1:50051",
            rich_help_panel=_REACHING,
        ),
    ] = None,
    challenger_address: Annotated[
        str | None,
        typer.Option(
            "--challenger-address",
            help="Of the challenger, on Kubernetes.",
            metavar="ADDR",
            show_default="its pod, from outside by way of the API server",
            rich_help_panel=_REACHING,
        ),
    ] = None,
    operator_token_file: Annotated[
        Path | None,
        typer.Option(
            "--operator-token-file",
            help="Token of the local service's operators; of a Triton's, where loading is restricted.",
            show_default="local: MILONGA_OPERATOR_TOKEN_FILE, MILONGA_OPERATOR_TOKEN",
            rich_help_panel=_REACHING,
        ),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS.", rich_help_panel=_REACHING)] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            help="Authorities (PEM) that the servers' certificates must come from.",
            rich_help_panel=_REACHING,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Client certificate (PEM), for mTLS.", rich_help_panel=_REACHING)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key (PEM).", rich_help_panel=_REACHING)
    ] = None,
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            help="Name in the servers' certificates: pods are reached by their addresses.",
            rich_help_panel=_REACHING,
        ),
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            help="MLflow server or database.",
            show_default="MLFLOW_TRACKING_URI, else ./mlflow.db",
            rich_help_panel=_REACHING,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of --history: as JSON.")] = False,
) -> None:
    """Roll a registered version through gates into the service, and back if they fail."""
    with exit_codes(EXIT_CODES), _termination_interrupts():
        given = [
            name
            for name, one in (
                ("--version", version),
                ("--rollback", rollback),
                ("--resume", resume),
                ("--history", history),
                ("--bootstrap", bootstrap),
            )
            if one
        ]
        if len(given) > 1:
            raise InvalidInputError(FieldViolation(" and ".join(given), "exclude each other; give one"))
        from training.promotion.ledger import Ledger, history_json, history_lines
        from training.promotion.registry import Registry

        registry = Registry(tracking_uri)
        ledger = Ledger(registry)
        if history:
            entries = ledger.entries()
            typer.echo(history_json(entries) if as_json else "\n".join(history_lines(entries)))
            return
        connection = _tls(tls, tls_ca, tls_cert, tls_key, tls_server_name)
        from training.promotion.promote import Parts, Wanted, roll_back
        from training.promotion.promote import bootstrap as pin_first
        from training.promotion.promote import promote as promote_version
        from training.promotion.promote import resume as finish

        found: Done
        parts = Parts(
            target=_open_target(
                *(target, registry, namespace, context, connection),
                repository=repository,
                generation_address=generation_address,
                challenger_address=challenger_address,
                token_file=operator_token_file,
            ),
            registry=registry,
            ledger=ledger,
            tell=timed_lines(),
            alias=alias,
            deadline=deadline,
        )
        if bootstrap:
            found = pin_first(_version_or_folder(bootstrap, registry), parts, model)
        elif rollback:
            found = roll_back(parts)
        elif resume:
            found = finish(parts)
        else:
            from training.promotion.gates.examination import Judges
            from training.promotion.gates.gates import DEFAULT_GATES, read_gates

            judges = Judges(scoring=scoring, reward=reward, tls=connection)
            wanted = Wanted(model=model, version=version)
            found = promote_version(wanted, read_gates(gates or DEFAULT_GATES), parts, judges)
        typer.echo(found.line)


def _open_target(
    kind: str,
    registry: "Registry",
    namespace: str,
    context: str | None,
    tls: "TLS | None",
    *,
    repository: str | None,
    generation_address: str | None,
    challenger_address: str | None,
    token_file: Path | None,
) -> "Target":
    if kind.startswith("triton://"):
        from services.inference.triton.repository import ModelRepository, open_storage
        from training.promotion.targets.triton import TritonTarget

        if repository is None:
            raise InvalidInputError(
                FieldViolation("--repository", "is missing; give the model repository that the Triton reads")
            )
        token = "" if token_file is None else _token(token_file)
        models = ModelRepository(open_storage(repository))
        return TritonTarget(_triton_address(kind), models, registry, tls=tls, token=token)
    if repository is not None:
        raise InvalidInputError(
            FieldViolation("--repository", f"is of a Triton, and --target is {kind}; give triton://HOST:PORT")
        )
    if kind == "local":
        from training.promotion.targets.local import LocalTarget

        address = generation_address or "127.0.0.1:50051"
        return LocalTarget(address, registry, token=_token(token_file), tls=tls)
    if kind != "kubernetes":
        raise _no_target(kind)
    from training.cluster.namespace import in_cluster
    from training.promotion.targets.cluster import connect_cluster
    from training.promotion.targets.kubernetes import KubernetesTarget

    return KubernetesTarget(
        connect_cluster(namespace, context),
        tell=timed_lines(),
        inside=context is None and in_cluster(),
        tls=tls,
        generation_address=generation_address,
        challenger_address=challenger_address,
    )


def _triton_address(target: str) -> str:
    """HOST:PORT of ``triton://HOST:PORT``. Raises `InvalidInputError`."""
    found = re.fullmatch(r"triton://((?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?)/?", target)
    if found is None:
        raise _no_target(target)
    return found[1]


def _no_target(target: str) -> InvalidInputError:
    return InvalidInputError(
        FieldViolation("--target", f"is {target!r}, must be kubernetes, local or triton://HOST:PORT")
    )


def _version_or_folder(place: str, registry: "Registry") -> "Version | Path":
    """What a model URI or folder names."""
    from services.weights.registry import parse_path
    from services.weights.uri import ModelURI, resolve

    folder = Path(place).expanduser()
    uri = ModelURI.parse(f"file:{folder}" if folder.is_dir() else place)
    if uri.scheme == "models":
        name, version, alias = parse_path(uri.path)
        number = version or registry.alias(name, alias)
        if number is None:
            raise InvalidInputError(
                FieldViolation("--bootstrap", f"is {place}, and {name} has no alias {alias}; give a version")
            )
        return registry.version(name, number)
    return resolve(uri).folder


def _token(file: Path | None) -> str:
    """The operator's token."""
    named = os.environ.get("MILONGA_OPERATOR_TOKEN_FILE")
    path = file or (Path(named) if named else None)
    try:
        text = os.environ.get("MILONGA_OPERATOR_TOKEN", "") if path is None else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            FieldViolation("--operator-token-file", f"{path} can't be read: {error}")
        ) from error
    if not text.strip():
        raise InvalidInputError(
            FieldViolation(
                "--operator-token-file",
                "is missing; start the service with MILONGA_OPERATOR_TOKEN_FILE and give the same file here",
            )
        )
    return text.strip()


def _tls(
    tls: bool, ca: Path | None, cert: Path | None, key: Path | None, server_name: str | None
) -> "TLS | None":
    from services.client import TLS

    if not (tls or ca or cert or key or server_name):
        return None
    return TLS(ca_file=ca, cert_file=cert, key_file=key, server_name=server_name)


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """A Job's pod that is taken away is told by SIGTERM: what was begun is undone, as by Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
