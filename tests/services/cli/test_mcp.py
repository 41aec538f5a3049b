"""The tools of `milonga mcp`, called by the protocol's own client."""

import base64
import io
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import soundfile
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from services.cli.mcp_server import build_server
from services.client import AsyncAudioClient
from tests.programs import environment
from tests.services.explanation import serving as explanation
from tests.services.generation import serving as generation
from tests.services.scoring import serving as scoring


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = scoring.save_tiny_clap(tmp_path_factory.mktemp("scorers") / "a", 0)
    with (
        generation.tiny_engine() as engine,
        generation.serving(engine) as generating,
        scoring.serving({"a": f"file:{folder}"}) as scored,
        explanation.serving(explanation.tiny_explainer()) as explained,
    ):
        yield {
            "target": generating.target,
            "scoring": scored.hosted.target,
            "explanation": explained.target,
        }


def _client(addresses: dict[str, str]) -> AsyncAudioClient:
    return AsyncAudioClient(
        addresses["target"],
        scoring=addresses["scoring"],
        explanation=addresses["explanation"],
        retries=0,
    )


@asynccontextmanager
async def _agent(addresses: dict[str, str], folder: Path) -> AsyncIterator[Any]:
    async with (
        _client(addresses) as client,
        Client(build_server(client, folder)) as agent,
    ):
        yield agent


def _content(result: Any) -> Any:
    assert not result.is_error, result.content
    return json.loads(result.content[0].text)


async def test_an_agent_makes_scores_and_explains_a_clip(addresses: dict[str, str], tmp_path: Path) -> None:
    async with _agent(addresses, tmp_path / "clips") as agent:
        tools = (await agent.list_tools()).tools
        assert [tool.name for tool in tools] == ["generate", "score", "caption", "explain", "clips"]
        assert all(tool.input_schema["additionalProperties"] is False for tool in tools)
        asked = {"prompt": "a dog barks", "seed": 7, "name": "bark", "num_inference_steps": 1}
        made = _content(await agent.call_tool("generate", asked))
        assert (made["clip"], made["seed"]) == ("bark.wav", 7)
        assert soundfile.info(tmp_path / "clips/bark.wav").samplerate == 16_000
        scores = _content(await agent.call_tool("score", {"prompt": "a dog barks", "clip": "bark.wav"}))
        assert -1 <= scores["scores"]["a"] <= 1
        explained = _content(await agent.call_tool("explain", {"prompt": "a dog barks", "seed": 7}))
        assert list(explained["peaks"]) == ["a", "dog", "barks"]
        (listed,) = (await agent.list_resources()).resources
        assert (str(listed.uri), listed.name, listed.mime_type) == (made["resource"], "bark.wav", "audio/wav")
        resource = await agent.read_resource(made["resource"])
        assert soundfile.info(io.BytesIO(base64.b64decode(resource.contents[0].blob))).format == "WAV"


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        ("generate", {"prompt": ""}, "prompt"),
        ("generate", {"prompt": "a dog", "duration": 99}, "must be between"),
        ("generate", {"prompt": "a dog", "name": "../x"}, "must be a file name"),
        ("score", {"prompt": "a dog", "clip": "absent.wav"}, "which is not in the folder"),
        ("caption", {"clip": "absent.wav"}, "which is not in the folder"),
        ("caption", {"clip": "../x"}, "clip: is '../x', must be a file name"),
        (
            "generate",
            {"prompt": "a dog", "steps": 1},
            "steps: unknown; leave it out (generate takes prompt, ",
        ),
        ("clips", {"folder": "/"}, "folder: unknown; leave it out (clips takes none)"),
        ("score", {"prompt": "a dog"}, "Field required"),
    ],
)
async def test_errors_name_field_and_remedy(
    addresses: dict[str, str], tmp_path: Path, tool: str, arguments: dict[str, object], says: str
) -> None:
    async with _agent(addresses, tmp_path) as agent:
        result = await agent.call_tool(tool, arguments)
    assert result.is_error
    assert says in result.content[0].text


async def test_the_command_speaks_the_protocol(addresses: dict[str, str], tmp_path: Path) -> None:
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "services.cli", "mcp", "--generation", addresses["target"], "--folder", str(tmp_path)],
        env=environment(),
    )
    async with Client(command) as agent:
        made = _content(
            await agent.call_tool("generate", {"prompt": "a dog barks", "num_inference_steps": 1})
        )
    assert Path(made["file"]).is_file()
