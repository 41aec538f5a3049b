"""`milonga serve`: run a microservice in this process."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from services.errors import FieldViolation, InvalidInputError

app = typer.Typer(help="Run a service until SIGTERM or Ctrl-C.", no_args_is_help=True)

PORTS: Mapping[str, int] = MappingProxyType({"generation": 50051, "scoring": 50052, "reward": 50053})
"""Every service, and the port of its settings' default; here too, since help must not import them."""

URI_FORMS = "file:PATH, hf:OWNER/NAME, models:/NAME/VERSION, each also with #sha256:HEX"

_WATCHING = "Watching, TLS and stopping"
"""The panel of the help in which the flags lie that are rarely wanted."""


def _rare(help: str, default: str | None = None) -> Any:
    return typer.Option(help=help, show_default=default or False, rich_help_panel=_WATCHING)


def _shared(
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.", show_default="auto")] = None,
    metrics_port: Annotated[int | None, _rare("Prometheus metrics over HTTP.", "off")] = None,
    health_port: Annotated[
        int | None, _rare("Health service in plaintext, for kubelet probes.", "off")
    ] = None,
    tls_cert_file: Annotated[Path | None, _rare("Certificate chain (PEM).", "plaintext")] = None,
    tls_key_file: Annotated[Path | None, _rare("Its private key (PEM).")] = None,
    tls_client_ca_file: Annotated[
        Path | None, _rare("Authorities (PEM) that clients' certificates must come from: mTLS.")
    ] = None,
    drain_delay_seconds: Annotated[
        float | None, _rare("On SIGTERM: serve on for so long after readiness is off.", "0")
    ] = None,
    grace_seconds: Annotated[
        float | None, _rare("After that: how long calls under way may take.", "30")
    ] = None,
    log_format: Annotated[str | None, _rare("auto, json, console.", "auto")] = None,
    log_level: Annotated[str | None, _rare("debug, info, warning, error.", "info")] = None,
) -> None:
    """The flags of every service beside `--listen`. Never called: `_service` reads its signature."""


def _service(*rare: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of `milonga serve`, named after the service.

    The flags are the function's own, `--listen` with the service's port, and those of `_shared`; the last two
    kinds reach it as its ``**shared``. `rare` are its settings without a flag.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__

        @functools.wraps(function)
        def command(**flags: Any) -> None:
            function(**flags)

        listen = typer.Option(
            help="HOST:PORT, or unix:/PATH.", show_default=f"127.0.0.1:{PORTS[name]}", metavar="<str>"
        )
        own = [one for one in _parameters(function) if one.kind is not inspect.Parameter.VAR_KEYWORD]
        address = inspect.Parameter(
            "listen", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, listen]
        )
        parameters = [
            one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, address, *_parameters(_shared))
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command(name, epilog=_epilog(rare))(command)
        return function

    return register


def _parameters(function: Callable[..., None]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _epilog(rare: Sequence[str]) -> str:
    names = (*rare, "THREADS", "MAX_REQUEST_BYTES", "MAX_CONNECTION_AGE_SECONDS")
    return (
        "Every flag is also read from the environment: --metrics-port is MILONGA_METRICS_PORT. So are "
        f"settings without a flag: {', '.join(f'MILONGA_{name}' for name in names)}."
    )


@_service("BATCH_SHAPES", "MAX_QUEUE", "MAX_CLIP_COUNT", "OPERATOR_TOKEN")
def generation(
    model: Annotated[
        str | None,
        typer.Option(help=f"Model URI: mini, mini-base, {URI_FORMS}.", show_default=False),
    ] = None,
    unpinned_model: Annotated[
        str | None,
        typer.Option(
            help="What to serve while there is no --model: for a first start, never in production.",
            show_default="nothing",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32")
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Always run one batch shape: the same request gives the same bits under any load.",
            show_default="no-exact",
        ),
    ] = None,
    operator_token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a token; whoever has it may switch models while calls are served "
            "(milonga.v1.OperatorService).",
            show_default="off",
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Serve one model: prompts in, clips out (milonga.v1.GenerationService)."""
    from services.generation import serve as service
    from services.generation.settings import GenerationSettings
    from services.runtime.settings import load_settings

    own = {
        "model": model,
        "unpinned_model": unpinned_model,
        "dtype": dtype,
        "exact": exact,
        "operator_token_file": operator_token_file,
    }
    service.run(load_settings(GenerationSettings, **own, **shared))


@_service("MAX_BATCH_SECONDS", "MAX_WAIT_SECONDS", "MAX_QUEUE_SECONDS", "MAX_BATCH_SIZE")
def scoring(
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A scorer: its name and the model URI of a CLAP model. May be given several times. "
            f"URIs: mini:clap-a, mini:clap-b, laion:PATH, laion-clap:PATH, {URI_FORMS}. "
            "MILONGA_SCORERS is a JSON object.",
            metavar="NAME=URI",
            show_default=False,
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Serve CLAP scores: clips and prompts in, how well they go together out (milonga.v1.ScoringService)."""
    from services.runtime.settings import load_settings
    from services.scoring import serve as service
    from services.scoring.settings import ScoringSettings

    service.run(load_settings(ScoringSettings, scorers=read_scorers(scorer), **shared))


@_service("MAX_BATCH_SECONDS", "MAX_WAIT_SECONDS", "MAX_QUEUE_SECONDS", "MAX_BATCH_SIZE")
def reward(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Model URI of a reward model: mini, {URI_FORMS}.",
            show_default=False,
        ),
    ] = None,
    clap: Annotated[
        str | None,
        typer.Option(
            help="Model URI of the CLAP model that it was trained on; it refuses another.",
            show_default="mini:clap-a",
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Serve a reward model: clips and prompts in, preferences out (milonga.v1.RewardService)."""
    from services.reward import serve as service
    from services.reward.settings import RewardSettings
    from services.runtime.settings import load_settings

    service.run(load_settings(RewardSettings, model=model, clap=clap, **shared))


def read_scorers(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """The model URI of each scorer by its name; None where `pairs`, each ``NAME=URI``, are none.

    Raises:
        InvalidInputError: one is no such pair, or a name comes twice.
    """
    scorers: dict[str, str] = {}
    faults = []
    for pair in pairs or ():
        name, equals, uri = (part.strip() for part in pair.partition("="))
        if not (name and equals and uri):
            faults.append(
                FieldViolation("--scorer", f"is {pair[:80]!r}, must be NAME=URI, for example a=mini:clap-a")
            )
        elif name in scorers:
            faults.append(FieldViolation("--scorer", f"names {name!r} twice; names must differ"))
        else:
            scorers[name] = uri
    if faults:
        raise InvalidInputError(*faults)
    return scorers or None
