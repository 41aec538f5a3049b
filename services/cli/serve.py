"""`milonga serve`: run a service, or the web door, in this process."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from services import web
from services.catalogue import CATALOGUE
from services.cli.options import environment_note, read_options, setting_options, with_options

if TYPE_CHECKING:
    from services.runtime.serving import Service
    from services.runtime.settings import ProcessSettings

app = typer.Typer(help="Run a service until SIGTERM or Ctrl-C.", no_args_is_help=True)


def service_of(name: str) -> "Service[Any, Any]":
    """Import and return the `SERVICE` of ``services/NAME/serve.py``."""
    service: Service[Any, Any] = importlib.import_module(f"services.{name}.serve").SERVICE
    return service


def _program(name: str) -> "tuple[type[ProcessSettings], Callable[[Any], None]]":
    """Return the class of a program's settings, and what runs it with them."""
    if name == web.NAME:
        from services.web.serve import run as run_web
        from services.web.settings import WebSettings

        return WebSettings, run_web
    from services.runtime.serving import run

    service = service_of(name)
    return service.settings, partial(run, service)


class ServeCommand(TyperCommand):
    """`milonga serve NAME`. Its options come from the service's settings, which are imported on first use."""

    def get_params(self, ctx: Any) -> Any:
        """Return the options, and set the epilog."""
        assert self.name is not None
        if not self.params:
            kind, _ = _program(self.name)
            made = typer.Typer(add_completion=False)
            made.command()(with_options(lambda **_: None, setting_options(kind)))
            self.params = typer.main.get_command(made).params
            self.epilog = environment_note(kind)
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> None:
        """Serve until SIGTERM or SIGINT."""
        assert self.name is not None
        kind, run = _program(self.name)
        run(read_options(kind, ctx.params))


def _nothing() -> None:
    """Do nothing. typer requires a callback; `ServeCommand.invoke` runs instead of it."""


for entry in CATALOGUE.values():
    app.command(entry.name, cls=ServeCommand, help=entry.summary)(_nothing)
app.command(web.NAME, cls=ServeCommand, help=web.SUMMARY)(_nothing)
