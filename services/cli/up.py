"""`milonga up`: run every service and the web door on this machine, each in its own process, until Ctrl-C."""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, Final, Self

import typer

from services import web
from services.catalogue import CATALOGUE
from services.cli.options import option_of, read_weights, setting_words, weights_options, with_options
from services.cli.outputs import make_folder
from services.errors import FieldViolation, InvalidInputError
from services.processes import ServicePlan, ServiceProcess, local_target, running
from services.web import studio

NAMES: Final = ", ".join(CATALOGUE)
FIRST_PORT: Final = min(entry.port for entry in CATALOGUE.values())

_POLL_SECONDS: Final = 0.1
_PER_SERVICE: Final = frozenset(
    {"listen", "health_port", "metrics_port"}
    | {weights.setting for entry in CATALOGUE.values() for weights in entry.weights}
)
"""Settings that services on one machine can't share: `up` sets them per service, or leaves them unset."""
EPILOG: Final = (
    "Prints a line for each service when it is ready; the services' logs go to stderr, each line prefixed "
    "with the service's name. Other settings come from the environment, as for milonga serve: "
    "MILONGA_DEVICE, MILONGA_THREADS, … "
    "Exit codes: 0 stopped by a signal, running calls finished · 130 stopped by a second "
    "signal, which cancels running calls · otherwise a service ended by itself: the others were stopped, and "
    "its exit code is returned."
)


def _up(
    host: Annotated[
        str,
        typer.Option(
            help="Interface to listen on; 0.0.0.0 for all interfaces, which needs MILONGA_CALLERS_FILE or "
            "MILONGA_ANONYMOUS=allowed. Without TLS."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            help=f"First of {len(CATALOGUE)} consecutive ports: {NAMES}.", min=1, max=65536 - len(CATALOGUE)
        ),
    ] = FIRST_PORT,
    web_port: Annotated[
        int | None,
        typer.Option(
            help=f"Port of the web door (HTTP); 0: none. Default: {web.PORT}, if it is free and the extra web"
            " is installed; with another --port none.",
            min=0,
            max=65535,
            show_default=False,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the logs, one file per service, instead of stderr.", show_default=False
        ),
    ] = None,
    **weights: Any,
) -> None:
    settings = read_weights(weights)
    _check_models(settings)
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    plans = [
        ServicePlan(
            name=name,
            arguments=tuple(word for given in settings[name].items() for word in setting_words(*given)),
            address=f"{shown}:{port + index}",
        )
        for index, name in enumerate(CATALOGUE)
    ]
    door, without = _web_plan(shown, port, web_port, plans)
    _check_ports([*plans, *door])
    if without:
        typer.echo(f"without the web door: {without}", err=True)
    plans += door
    if log_dir is not None:
        make_folder(log_dir)
    code, failure = _run(plans, log_dir)
    if failure:
        typer.echo(f"error: {failure}", err=True)
    raise typer.Exit(code)


up = with_options(_up, weights_options())
up.__doc__ = f"Run every service on this machine until Ctrl-C: {NAMES}, and {web.NAME} in front of them."


def _web_plan(
    host: str, first_port: int, port: int | None, services: Sequence[ServicePlan]
) -> tuple[list[ServicePlan], str]:
    """Return the plan of the web door in front of `services`, or none and why it is left out unasked."""
    if port == 0 or (port is None and first_port != FIRST_PORT):
        return [], ""
    address = f"{host}:{port or web.PORT}"
    if port is None:
        if not web.is_installed():
            return [], "pip install 'milonga[web]'"
        try:
            _check_ports([ServicePlan(name=web.NAME, arguments=(), address=address)])
        except InvalidInputError:
            return [], f"{address} is in use; give --web-port"
    arguments = tuple(
        word
        for plan in services
        if plan.name in web.SERVICES
        for word in (f"--{plan.name}", local_target(plan.address))
    )
    return [ServicePlan(name=web.NAME, arguments=arguments, address=address, http=True)], ""


def _run(plans: Sequence[ServicePlan], log_dir: Path | None) -> tuple[int, str | None]:
    """Run services until a signal, or until one ends by itself; then stop all.

    Returns the exit code, and the exit summary of the service that ended by itself.
    """
    with _SignalCounter() as signals:
        environment = _environment(log_dir)
        with running(
            plans, logs=log_dir, environment=environment, hurry=lambda: signals.count > 1
        ) as services:
            ended = _watch(services, signals)
            failure = None if ended is None else ended.exit_summary()
            if ended is None:
                typer.echo("stopping; a second Ctrl-C cancels running calls", err=True)
            else:
                typer.echo(f"{ended.plan.name} ended; stopping the others", err=True)
        if ended is None:
            return (130 if signals.count > 1 else 0), None
        code = ended.process.returncode
        return (code if code > 0 else 1), failure


def _watch(services: Sequence[ServiceProcess], signals: "_SignalCounter") -> ServiceProcess | None:
    """Print services as they become ready; return the one that ended by itself, or None at a signal."""
    waiting = list(services)
    while not signals.count:
        for service in services:
            if not service.running and not signals.count:
                return service
        for service in tuple(waiting):
            if service.is_serving():
                waiting.remove(service)
                _print_ready(service)
                if not waiting:
                    _print_examples(services)
        time.sleep(_POLL_SECONDS)
    return None


def _print_ready(service: ServiceProcess) -> None:
    plan, seconds = service.plan, service.ready_seconds or 0.0
    models = " ".join(word for word in plan.arguments if not word.startswith("--"))
    if plan.http:
        models = f"http://{service.target}/docs"
    typer.echo(f"{plan.name:<10}  {plan.address}  {models}  ready after {seconds:.1f} s")


def _print_examples(services: Sequence[ServiceProcess]) -> None:
    examples = [
        CATALOGUE[one.plan.name].example.format(one.target) for one in services if one.plan.name in CATALOGUE
    ]
    examples += [web.EXAMPLE.format(one.target) for one in services if one.plan.http]
    typer.echo(f"all ready; Ctrl-C stops them. Try: {' · '.join(examples)}")
    for one in services:
        if one.plan.http:
            typer.echo(f"studio: {_studio(one.target)}")


def _studio(target: str) -> str:
    """Return the address of the studio, or what it needs."""
    if not studio.is_installed():
        return "not installed; pip install 'milonga[studio]'"
    return f"http://{target}"


def _check_models(settings: Mapping[str, Mapping[str, str | Mapping[str, str]]]) -> None:
    """Raise `InvalidInputError` for invalid model URIs, before any service is started."""
    from services.weights.uri import parse_uris

    faults: list[FieldViolation] = []
    for entry in CATALOGUE.values():
        for weights in entry.weights:
            value = settings[entry.name][weights.setting]
            try:
                texts = {"": value} if isinstance(value, str) else value
                given = {name: text for name, text in texts.items() if text or not weights.optional}
                parse_uris(given, field=f"--{option_of(weights)}")
            except InvalidInputError as error:
                faults += error.violations
    if faults:
        raise InvalidInputError(*faults)


def _check_ports(plans: Sequence[ServicePlan]) -> None:
    """Raise `InvalidInputError` for ports in use, before any service is started."""
    from services.runtime.server import check_free

    faults: list[FieldViolation] = []
    for plan in plans:
        try:
            check_free("--port", plan.address)
        except InvalidInputError as error:
            faults += error.violations
    if faults:
        raise InvalidInputError(*faults)


def _environment(log_dir: Path | None) -> dict[str, str]:
    """Return this process's environment without the settings that services can't share."""
    dropped = {f"MILONGA_{name.upper()}" for name in _PER_SERVICE}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith("MILONGA_TLS_")
    }
    if log_dir is None and sys.stderr.isatty():
        # A service's log goes to a pipe, but ends up on this terminal.
        kept.setdefault("MILONGA_LOG_FORMAT", "console")
    return kept


class _SignalCounter:
    """Counts SIGINT, SIGTERM and SIGHUP instead of letting them end the process."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # ignored by nohup
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
