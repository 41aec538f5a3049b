"""The `milonga` command.

    milonga generate "A dog barks then a siren wails" -o clip.wav --seed 7
    milonga score "A dog barks then a siren wails" clip.wav other.flac
    milonga caption clip.wav other.flac
    milonga explain "A dog barks then a siren wails" -o why.html
    milonga serve generation --model mini --listen 127.0.0.1:50051
    milonga up
    milonga fetch models:/milonga-tango/7
    milonga verify clip.wav
    milonga ratings plan --a mini --b mini-base --prompts prompts.jsonl
    milonga token studio --output studio.token >> callers.toml
    milonga triton export --model mini repository/
    milonga convert PATH-OF-A-RELEASED-CHECKPOINT tango2/ --text-encoder DIR
    milonga convert-audiogen audiogen-medium/ audiogen/ --text-encoder hf:t5-large
    milonga convert-captioner EAT.pt MODEL.pt PEFT_FOLDER slam-aac/ --language-model DIR
    milonga doctor

Importing this module does not import torch: each command imports what it needs when it runs. Training adds
commands through the entry-point group `milonga.commands`; without training's libraries they are left out.
"""

import errno
import gc
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence

import typer
import typer.main

from services.cli import (
    caption,
    convert,
    doctor,
    explain,
    fetch,
    generate,
    mcp,
    ratings,
    score,
    serve,
    token,
    triton,
    up,
    verify,
)
from services.environment import HUB_SCHEMES, quiet_libraries
from services.errors import (
    AlreadyUnderWayError,
    DeadlineExceededError,
    InvalidInputError,
    MilongaError,
    ModelError,
    NotFiniteError,
    OutputError,
    PermissionDeniedError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
    TooLargeError,
    UnauthenticatedError,
    UnsupportedError,
)
from services.runtime.telemetry import start as start_traces

COMMAND_GROUP = "milonga.commands"
EXIT_CODES: dict[type[BaseException], int] = {
    NotFiniteError: 1,
    InvalidInputError: 2,
    ModelError: 2,
    UnauthenticatedError: 2,
    PermissionDeniedError: 2,
    UnsupportedError: 2,
    TooLargeError: 2,
    QueueFullError: 3,
    DeadlineExceededError: 3,
    ServiceUnavailableError: 3,
    AlreadyUnderWayError: 3,
    OutputError: 4,
    RequestCancelledError: 130,
    KeyboardInterrupt: 130,
}
"""Exit code of an exception: that of its nearest class. Any other exception is an internal error: 1."""

_HUB_URI = re.compile(rf"""(?:^|[="])(?:{"|".join(HUB_SCHEMES)}):""")
"""A model URI that may need the hub: an argument, in NAME=URI, or in the JSON of MILONGA_SCORERS."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a full or read-only file system."""

_EPILOG = (
    "Exit codes: 0 success · 1 internal error of milonga or of the service, or something is not installed · "
    "2 wrong input, or the model was refused · 3 service unreachable, queue full or deadline passed · "
    "4 output not writable · 130 interrupted. MILONGA_DEBUG=1 shows tracebacks."
)


def _print_version(flag: bool) -> None:
    if flag:
        typer.echo(importlib.metadata.version("milonga"))
        raise typer.Exit


def build_app() -> typer.Typer:
    """Return the `milonga` app: its own commands and those of the entry-point group."""
    app = typer.Typer(
        name="milonga",
        help="Text to audio: generate, score and describe clips, serve models, convert released weights.",
        epilog=_EPILOG,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def _root(
        version: bool = typer.Option(
            False, "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ) -> None:
        pass

    app.command()(generate.generate)
    app.command()(score.score)
    app.command()(caption.caption)
    app.command()(explain.explain)
    app.add_typer(serve.app, name="serve")
    app.command("up", epilog=up.EPILOG)(up.up)
    app.command()(fetch.fetch)
    app.command()(convert.convert)
    app.command("convert-captioner")(convert.convert_captioner)
    app.command("convert-audiogen")(convert.convert_audiogen)
    app.command()(token.token)
    app.command()(verify.verify)
    app.command()(mcp.mcp)
    app.add_typer(triton.app, name="triton")
    app.add_typer(ratings.app, name="ratings")
    app.command()(doctor.doctor)
    for entry in sorted(importlib.metadata.entry_points(group=COMMAND_GROUP)):
        try:
            app.add_typer(entry.load(), name=entry.name)
        except ImportError:
            # A serving image holds no training libraries; `milonga doctor` reports which are missing.
            continue
    return app


def exit_code(error: BaseException) -> int:
    """Return the exit code for `error`, by `EXIT_CODES`."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), 1)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (None: `sys.argv`); return the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    quiet_libraries(online=_needs_hub(words))
    command = typer.main.get_command(build_app())
    try:
        if words[:1] != ["serve"]:  # a service has its own name
            start_traces("milonga")
        code = command.main(args=words, prog_name="milonga", standalone_mode=False)
    except typer.Exit as error:
        return error.exit_code
    except typer.TyperException as error:
        # A wrong option or argument: typer's own message, with the usage.
        show = getattr(error, "show", None)
        if show is not None:
            show()
        return int(getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output has closed it (`| head`). Keep the interpreter from reporting that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("MILONGA_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in _FULL:
            # From standard output or a temporary folder; our own writers raise OutputError.
            error = OutputError(f"the output can't be written: {error.strerror}")
        code = exit_code(error)
        typer.echo(f"error: {_one_line(error, code)}", err=True)
        return code
    return code if isinstance(code, int) else 0


def _needs_hub(words: Sequence[str]) -> bool:
    """Return whether an argument or a ``MILONGA_*`` variable names a model on the Hugging Face hub."""
    variables = [value for name, value in os.environ.items() if name.startswith("MILONGA_")]
    return any(_HUB_URI.search(one) for one in (*words, *variables))


def _one_line(error: Exception, code: int) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(("services", "training")):
        return (
            f"{error.name} is not installed; pip install 'milonga[serving]', or use services "
            "(--server, --scoring, --reward-server)"
        )
    if code != 1 or isinstance(error, MilongaError):
        return text
    return f"{type(error).__name__}: {text} (internal error; MILONGA_DEBUG=1 shows the traceback)"


def main() -> None:
    """Console script."""
    code = run()
    # At exit Python would look for cycles among what torch and the others imported, which takes a second.
    gc.freeze()
    sys.exit(code)
