"""`milonga promote`. Imports nothing heavy until a command runs, so that the command line starts fast.

milonga promote bootstrap mini-base
milonga promote run --model milonga-tango --version 7
milonga promote rollback
milonga promote history --json
milonga promote gates --power
milonga promote resume
"""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from services.cli.options import check_address, grouped
from services.client import ServiceOptions
from services.errors import FieldViolation, InvalidInputError, invalid
from training.commands.targets import TargetOptions, TrackingURI, open_target
from training.exits import exit_codes, timed_lines
from training.promotion.errors import EXIT_CODES

if TYPE_CHECKING:
    from services.weights.registry import RegisteredVersion
    from services.weights.uri import ResolvedModel
    from training.promotion.promote import Promoter
    from training.promotion.registry import Registry

EPILOG = (
    "Exit codes: 0 done · 2 wrong input, or the model was refused · 3 the gates refused · 4 challenger or "
    "rollout failed, and was rolled back · 5 another promotion runs, or was left unfinished · 6 cluster, "
    "registry or service unreachable, or no permission · 7 the rollback failed: needs a person · 8 done, but "
    "not recorded in the ledger · 130 interrupted, and rolled back."
)

_MOVED = {
    "--rollback": "rollback",
    "--history": "history",
    "--resume": "resume",
    "--bootstrap": "bootstrap",
}
"""Sub-command by the flag that selected it until 0.1."""

GatesFile = Annotated[
    Path | None,
    typer.Option(
        "--gates",
        help="File of gates.",
        show_default="gates/mini.toml, for the mini family",
        rich_help_panel="Gates",
    ),
]
Alias = Annotated[
    str,
    typer.Option("--alias", help="Alias of the version that is served."),
]
Model = Annotated[str, typer.Option("--model", help="Registered model.")]


class _PromoteGroup(TyperGroup):
    """The sub-commands. Answers the flags of former releases with the command that replaces them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        params = [param for command in self.commands.values() for param in command.params]
        flags = {*_MOVED, *(flag for param in params for flag in param.opts)}
        if args and args[0].partition("=")[0] in flags:
            raise InvalidInputError(_moved(args))
        return super().parse_args(ctx, args)


def _moved(words: list[str]) -> FieldViolation:
    """Return the arguments that replace `words`, those of a former release."""
    named = [word.partition("=")[0] for word in words]
    flag = next((one for one in _MOVED if one in named), words[0].partition("=")[0])
    kept = [word.removeprefix(f"{flag}=") for word in words if word != flag] if flag in _MOVED else words
    command = ["milonga", "promote", _MOVED.get(flag, "run"), *kept]
    verb = "is now a command" if flag in _MOVED else "is now an option of a command"
    return FieldViolation(flag, f"{verb}: {shlex.join(command)}")


promote = typer.Typer(
    cls=_PromoteGroup,
    help="Roll out registered weights behind gates, and roll back.",
    epilog=EPILOG,
    no_args_is_help=True,
)


@promote.callback()
def _promote() -> None:
    pass


@promote.command(epilog=EPILOG)
@grouped
def run(
    *,
    model: Model = "milonga-tango",
    version: Annotated[
        str | None,
        typer.Option(
            "--version", help="Version to promote.", show_default="the one with the alias challenger"
        ),
    ] = None,
    gates: GatesFile = None,
    alias: Alias = "champion",
    scoring: Annotated[
        str | None,
        typer.Option(
            "--scoring",
            help="Address of a scoring service, instead of scorers in this process.",
            metavar="ADDR",
            rich_help_panel="Gates",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward-server",
            help="Address of a reward service, instead of a reward model in this process.",
            metavar="ADDR",
            rich_help_panel="Gates",
        ),
    ] = None,
    ratings: Annotated[
        str | None,
        typer.Option(
            "--ratings",
            envvar="MILONGA_RATINGS",
            help="Database of ratings by people, for the gate human_preference.",
            metavar="URL",
            show_default=False,
            show_envvar=True,
            rich_help_panel="Gates",
        ),
    ] = None,
    min_known: Annotated[
        float,
        typer.Option(
            "--min-known",
            help="Leave out raters who answer less than this share of the known pairs right.",
            min=0,
            max=1,
            rich_help_panel="Gates",
        ),
    ] = 0.0,
    target: TargetOptions,
    connection: ServiceOptions,
) -> None:
    """Roll out a registered version if it passes the gates; roll back if the rollout fails."""
    check_address("--scoring", scoring)
    check_address("--reward-server", reward)
    with _promoter(target, connection, alias) as promoter:
        from training.promotion import promote
        from training.promotion.gates.examination import ScorerServices
        from training.promotion.gates.gates import DEFAULT_GATES, read_gates
        from training.promotion.gates.human import RatingsSource

        config = read_gates(gates or DEFAULT_GATES)
        source = None if ratings is None else RatingsSource(url=ratings, min_known=min_known)
        services = ScorerServices(scoring=scoring, reward=reward, connection=connection)
        typer.echo(
            promote.promote(promoter, config, model=model, version=version, services=services, ratings=source)
        )


@promote.command(epilog=EPILOG)
@grouped
def rollback(*, alias: Alias = "champion", target: TargetOptions, connection: ServiceOptions) -> None:
    """Serve what was served before the last promotion, without gates."""
    with _promoter(target, connection, alias) as promoter:
        from training.promotion import promote

        typer.echo(promote.roll_back(promoter))


@promote.command()
def history(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tracking_uri: TrackingURI = None,
) -> None:
    """Print the ledger of promotions, newest first."""
    with exit_codes(EXIT_CODES):
        from training.promotion.ledger import Ledger, history_json, history_lines
        from training.promotion.registry import Registry

        entries = Ledger(Registry(tracking_uri)).entries()
        typer.echo(history_json(entries) if as_json else "\n".join(history_lines(entries)))


@promote.command("gates")
def print_gates(
    *,
    gates: GatesFile = None,
    power: Annotated[
        bool, typer.Option("--power", help="Print the chance to pass, by the true difference of two models.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="The champion's rate.", min=0, max=1, show_default="several"),
    ] = None,
    discordant: Annotated[
        float | None,
        typer.Option(
            "--discordant",
            help="Share of clips on which two equally good models differ.",
            min=0,
            max=1,
            show_default="as if they erred independently",
        ),
    ] = None,
    dependence: Annotated[
        float,
        typer.Option(
            "--dependence", help="Share of prompts whose clips of all seeds are alike.", min=0, max=1
        ),
    ] = 0.5,
    deviation: Annotated[
        list[str] | None,
        typer.Option(
            "--deviation",
            help="Standard deviation over prompts of challenger - champion, for a figure that is no rate; "
            "can be repeated.",
            metavar="FIGURE=SD",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", help="Simulated promotions per chance.", min=100, max=100_000)
    ] = 2_000,
) -> None:
    """Check a file of gates and print its gates; with --power, how likely they are to pass."""
    with exit_codes(EXIT_CODES):
        from training.promotion.gates.gates import DEFAULT_GATES, read_gates
        from training.promotion.gates.power import Assumptions, gate_lines, power_lines, read_deviations

        config = read_gates(gates or DEFAULT_GATES)
        deviations = read_deviations(deviation or [], config)
        assumptions = Assumptions(
            rate=rate, discordant=discordant, dependence=dependence, deviations=deviations, trials=trials
        )
        typer.echo("\n".join(power_lines(config, assumptions) if power else gate_lines(config)))


@promote.command(epilog=EPILOG)
@grouped
def resume(*, target: TargetOptions, connection: ServiceOptions) -> None:
    """Finish or undo a promotion whose promoter died."""
    with _promoter(target, connection) as promoter:
        from training.promotion import promote

        typer.echo(promote.resume(promoter))


@promote.command(epilog=EPILOG)
@grouped
def bootstrap(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URI_OR_FOLDER",
            help="Model URI, or model folder, which is registered if it is not yet.",
            show_default=False,
        ),
    ],
    *,
    model: Model = "milonga-tango",
    alias: Alias = "champion",
    target: TargetOptions,
    connection: ServiceOptions,
) -> None:
    """Pin the first version of a target that has no pin."""
    with _promoter(target, connection, alias) as promoter:
        from training.promotion import promote

        typer.echo(promote.bootstrap(promoter, _version_or_model(source, promoter.registry), model))


@contextmanager
def _promoter(
    options: TargetOptions, connection: ServiceOptions, alias: str = "champion"
) -> Iterator["Promoter"]:
    """Yield what a promotion works with. Errors inside end the command with their exit codes."""
    with exit_codes(EXIT_CODES), _termination_interrupts():
        from training.promotion.ledger import Ledger
        from training.promotion.promote import Promoter
        from training.promotion.registry import Registry

        registry = Registry(options.tracking_uri)
        yield Promoter(
            target=open_target(options, connection, registry),
            registry=registry,
            ledger=Ledger(registry),
            report=timed_lines(),
            alias=alias,
            deadline=options.deadline,
        )


def _version_or_model(source: str, registry: "Registry") -> "RegisteredVersion | ResolvedModel":
    """Return the registered version that `source` names, or else the model in its folder."""
    from services.weights.registry import parse_path
    from services.weights.uri import ModelURI, resolve

    folder = Path(source).expanduser()
    uri = ModelURI.parse(f"file:{folder}" if folder.is_dir() else source)
    if uri.scheme == "models":
        name, version, alias = parse_path(uri.path)
        number = version or registry.alias(name, alias)
        if number is None:
            raise invalid("bootstrap", f"is {source}, and {name} has no alias {alias}; give a version")
        return registry.version(name, number)
    return resolve(uri)


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that a Job whose pod is deleted rolls back as on Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
