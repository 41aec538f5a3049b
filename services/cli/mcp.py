"""`milonga mcp`: the services as tools for agents, by the Model Context Protocol."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import check_address
from services.client import AsyncAudioClient
from services.errors import UnsupportedError


def mcp(
    generation: Annotated[str, typer.Option(help="Address of the generation service.")] = "127.0.0.1:50051",
    scoring: Annotated[str | None, typer.Option(help="Address of the scoring service.")] = None,
    captioning: Annotated[str | None, typer.Option(help="Address of the captioning service.")] = None,
    explanation: Annotated[str | None, typer.Option(help="Address of the explanation service.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the clips.")] = Path("milonga-clips"),
) -> None:
    """Let agents make, score, describe and explain clips: the tools of an MCP server (stdio)."""
    check_address("--generation", generation)
    check_address("--scoring", scoring)
    check_address("--captioning", captioning)
    check_address("--explanation", explanation)
    if find_spec("mcp") is None:
        raise UnsupportedError("mcp is not installed; pip install 'milonga[mcp]'")
    from services.cli.mcp_server import build_server

    client = AsyncAudioClient(generation, scoring=scoring, captioning=captioning, explanation=explanation)
    build_server(client, folder).run()
