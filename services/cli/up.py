"""`milonga up`: every service on this machine, one process each, one command, one Ctrl-C."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, Final, Self

import typer

from services.cli import judging
from services.cli.outputs import make_folder
from services.cli.serve import PORTS, read_scorers
from services.errors import FieldViolation, InvalidInputError
from services.processes import ServicePlan, ServiceProcess, running

DEFAULT_SCORERS: Final = tuple(f"{name}={uri}" for name, uri in judging.SCORERS.items())

_POLL_SECONDS: Final = 0.1
_PER_SERVICE: Final = ("LISTEN", "MODEL", "SCORERS", "HEALTH_PORT", "METRICS_PORT")
"""Settings that services on one machine can't share, and `up` gives itself or leaves off."""
EPILOG: Final = (
    "Prints a line for each service when it is ready; their logs go to stderr, each line after the "
    "service's name. Other settings come from the environment, as for milonga serve: MILONGA_DEVICE, "
    "MILONGA_THREADS, … Exit codes: 0 stopped by a signal, calls under way finished · 130 by a second "
    "signal, which ends them at once · otherwise a service ended by itself: the others were stopped, and its "
    "exit code is this one's."
)


def up(
    generation: Annotated[str, typer.Option(help="Model URI of the generation service.")] = "mini",
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A scorer of the scoring service, as for milonga serve scoring. May be given several times.",
            metavar="NAME=URI",
            show_default=" ".join(DEFAULT_SCORERS),
        ),
    ] = None,
    reward: Annotated[str, typer.Option(help="Model URI of the reward service.")] = "mini",
    clap: Annotated[
        str, typer.Option(help="Model URI of the CLAP model that the reward model was trained on.")
    ] = "mini:clap-a",
    host: Annotated[
        str, typer.Option(help="Interface to listen on; 0.0.0.0 for every one. Without TLS.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            help="First of three consecutive ports: generation, scoring, reward.",
            min=1,
            max=65536 - len(PORTS),
        ),
    ] = PORTS["generation"],
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for the logs, one file a service, instead of stderr.", show_default=False),
    ] = None,
) -> None:
    """Run all three services on this machine until Ctrl-C: generation, scoring and reward."""
    scorers = read_scorers(scorer or DEFAULT_SCORERS) or {}
    arguments = {
        "generation": ("--model", generation),
        "scoring": tuple(word for name, uri in scorers.items() for word in ("--scorer", f"{name}={uri}")),
        "reward": ("--model", reward, "--clap", clap),
    }
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    plans = [
        ServicePlan(name=name, arguments=arguments[name], address=f"{shown}:{port + index}")
        for index, name in enumerate(PORTS)
    ]
    _check_models(
        {"--generation": [generation], "--scorer": scorers.values(), "--reward": [reward], "--clap": [clap]}
    )
    _check_ports(plans)
    if log_dir is not None:
        make_folder(log_dir)
    code, last_words = _run(plans, log_dir)
    if last_words:
        typer.echo(f"error: {last_words}", err=True)
    raise typer.Exit(code)


def _run(plans: Sequence[ServicePlan], log_dir: Path | None) -> tuple[int, str | None]:
    """Run services until a signal or until one ends by itself.

    Returns the exit code, and how that one ended. None of them is left.
    """
    with _Signals() as signals:
        environment = _environment(log_dir)
        with running(
            plans, logs=log_dir, environment=environment, hurry=lambda: signals.count > 1
        ) as services:
            ended = _watch(services, signals)
            last_words = None if ended is None else ended.obituary()
            if ended is None:
                typer.echo("stopping; a second Ctrl-C ends calls under way", err=True)
            else:
                typer.echo(f"{ended.plan.name} ended; stopping the others", err=True)
        if ended is None:
            return (130 if signals.count > 1 else 0), None
        code = ended.process.returncode
        return (code if code > 0 else 1), last_words


def _watch(services: Sequence[ServiceProcess], signals: "_Signals") -> ServiceProcess | None:
    """Tell what becomes ready. Returns at the first signal, or with the service that ended by itself."""
    waiting = list(services)
    while not signals.count:
        for service in services:
            if not service.running and not signals.count:
                return service
        for service in tuple(waiting):
            if service.is_serving():
                waiting.remove(service)
                _tell_ready(service)
                if not waiting:
                    _tell_how_to_call({one.plan.name: one.target for one in services})
        time.sleep(_POLL_SECONDS)
    return None


def _tell_ready(service: ServiceProcess) -> None:
    plan, seconds = service.plan, service.ready_seconds or 0.0
    models = " ".join(word for word in plan.arguments if not word.startswith("--"))
    typer.echo(f"{plan.name:<10}  {plan.address}  {models}  ready after {seconds:.1f} s")


def _tell_how_to_call(targets: Mapping[str, str]) -> None:
    typer.echo(
        f"all ready; Ctrl-C stops them. Try: milonga generate 'A dog barks' --server {targets['generation']}"
        f" · milonga score 'A dog barks' clip.wav --scoring {targets['scoring']}"
        f" --reward-server {targets['reward']}"
    )


def _check_models(models: Mapping[str, Iterable[str]]) -> None:
    """Refuse what is no model URI before anything is started."""
    from services.weights.uri import ModelURI

    faults = []
    for flag, uris in models.items():
        for uri in uris:
            try:
                ModelURI.parse(uri)
            except InvalidInputError as error:
                faults += [FieldViolation(flag, one.description) for one in error.violations]
    if faults:
        raise InvalidInputError(*faults)


def _check_ports(plans: Sequence[ServicePlan]) -> None:
    """Refuse ports that are taken before anything is started."""
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
    """This process's environment for each service, without what they can't share."""
    dropped = tuple(f"MILONGA_{name}" for name in _PER_SERVICE)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith("MILONGA_TLS_")
    }
    if log_dir is None and sys.stderr.isatty():
        # To a service its log looks like a pipe; somebody reads it.
        kept.setdefault("MILONGA_LOG_FORMAT", "console")
    return kept


class _Signals:
    """Counts the signals that ask to stop, instead of being ended by them."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # run by nohup
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
