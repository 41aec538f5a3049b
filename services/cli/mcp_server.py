"""Tools for agents by the Model Context Protocol: make, score, describe and explain clips through services.

Clips are files of one folder. A tool returns a clip's name and its resource, ``milonga://clips/NAME``.
"""

import functools
import inspect
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import Resource, Tool

from services.client import AsyncAudioClient
from services.errors import MilongaError, OutputError, invalid
from services.files import write_atomically

NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""Pattern of a clip's file name: no path leads out of the folder."""
_MIME: Final = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg"}
_ANY: Final = "audio/*"


class Tools:
    """The tools, over a client and a folder of clips. Errors name the field and the remedy."""

    def __init__(self, client: AsyncAudioClient, folder: Path) -> None:
        self._client, self._folder = client, folder

    async def generate(
        self,
        prompt: str,
        name: str | None = None,
        seed: int | None = None,
        duration: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        encoding: Literal["wav", "flac", "mp3", "opus"] = "wav",
    ) -> dict[str, Any]:
        """Make a sound effect of a description, such as "A dog barks then a siren wails".

        The duration is in seconds. Returns the clip's file, its resource, its seed, with which it can be made
        again, the model, and warnings about words that the model does not know.
        """
        stem = name or f"clip-{secrets.token_hex(4)}"
        path = self._path(stem if stem.endswith(f".{encoding}") else f"{stem}.{encoding}")
        made = await self._client.generate(
            prompt,
            seed=seed,
            duration=duration,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            encoding=encoding,
        )
        clip = made.clips[0]
        write_atomically(path, clip.audio)
        return {
            "clip": path.name,
            "file": str(path),
            "resource": _uri(path.name),
            "seed": clip.seed,
            "duration": clip.duration,
            "sample_rate": clip.sampling_rate,
            "model": asdict(made.model),
            "warnings": list(made.warnings),
        }

    async def score(self, prompt: str, clip: str) -> dict[str, Any]:
        """Score how well a clip of the folder matches a description: CLAP scores, at most 1."""
        found = await self._client.score_audio([(prompt, self._existing(clip))])
        names = [scorer.name for scorer in found.scorers]
        values = zip(names, found.values[0].tolist(), found.readable[0].tolist(), strict=True)
        return {
            "scores": {name: value if known else None for name, value, known in values},
            "warnings": list(found.warnings[0]),
        }

    async def caption(self, clip: str) -> dict[str, Any]:
        """Describe a clip of the folder in a sentence."""
        found = await self._client.caption_audio([self._existing(clip)])
        return {"caption": found.captions[0].text, "warnings": list(found.captions[0].warnings)}

    async def explain(self, prompt: str, seed: int | None = None) -> dict[str, Any]:
        """Return the second at which each word of a description matters most, in a clip made from it."""
        found = await self._client.explain_audio(prompt, seed=seed)
        words = dict(zip(found.words, found.peaks(), strict=True))
        return {"seed": found.seed, "method": found.method, "peaks": words, "warnings": list(found.warnings)}

    def clips(self) -> list[str]:
        """List the clips of the folder."""
        return sorted(path.name for path in self._folder.iterdir() if re.fullmatch(NAME, path.name))

    def read(self, name: str) -> bytes:
        """Return a clip's file."""
        return self._existing(name).read_bytes()

    def _path(self, name: str, field: str = "name") -> Path:
        if not re.fullmatch(NAME, name):
            raise invalid(field, f"is {name[:80]!r}, must be a file name of letters, digits, dots and dashes")
        return self._folder / name

    def _existing(self, name: str) -> Path:
        path = self._path(name, "clip")
        if not path.is_file():
            there = ", ".join(self.clips()[:20]) or "none"
            raise invalid("clip", f"is {name!r}, which is not in the folder; there are: {there}")
        return path


class Server(MCPServer[Any]):  # type: ignore[misc]  # mypy takes mcp for Any
    """An MCP server of tools. It lists the clips of their folder, and refuses arguments that no tool has."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(
            "milonga", instructions="Make sound effects from descriptions, score, describe and explain them."
        )
        self._tools = tools
        calls: tuple[Callable[..., Awaitable[Any] | Any], ...] = (
            tools.generate,
            tools.score,
            tools.caption,
            tools.explain,
            tools.clips,
        )
        for call in calls:
            self.add_tool(_telling(call))
        self.resource(_uri("{name}"), mime_type=_ANY, description="A clip's file.")(tools.read)

    async def list_resources(self) -> list[Resource]:
        """Return a resource per clip."""
        return [
            Resource(uri=_uri(name), name=name, mime_type=_MIME.get(name.rpartition(".")[2], _ANY))
            for name in self._tools.clips()
        ]

    async def list_tools(self) -> list[Tool]:
        """Return the tools, whose schemas say that they take no further arguments."""
        return [
            tool.model_copy(update={"input_schema": {**tool.input_schema, "additionalProperties": False}})
            for tool in await super().list_tools()
        ]

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        """Call a tool. Raises `ToolError` for an argument that it does not have."""
        for tool in await super().list_tools():
            known = tool.input_schema.get("properties", {})
            unknown = [one[:80] for one in arguments if one not in known]
            if tool.name == name and unknown:
                takes = f"takes {', '.join(known)}" if known else "takes none"
                raise ToolError(f"{', '.join(unknown)}: unknown; leave it out ({name} {takes})")
        return await super().call_tool(name, arguments, context)


def _uri(name: str) -> str:
    return f"milonga://clips/{name}"


def _telling(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a tool whose errors reach the agent; those of bugs do not."""

    @functools.wraps(call)
    async def tool(*arguments: Any, **named: Any) -> Any:
        try:
            found = call(*arguments, **named)
            return await found if inspect.isawaitable(found) else found
        except MilongaError as error:
            raise ToolError(str(error)) from error

    return tool


def build_server(client: AsyncAudioClient, folder: Path) -> Server:
    """Return the MCP server of the tools, over a folder of clips.

    Raises:
        OutputError: the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} can't be made: {error.strerror}; give another --folder") from error
    return Server(Tools(client, folder))
