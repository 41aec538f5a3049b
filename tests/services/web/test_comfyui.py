"""ComfyUI's node, against a web door. ComfyUI itself is not run."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from examples.comfyui import NODE_CLASS_MAPPINGS
from tests.services.generation.serving import Serving

PROMPT = "a dog barks"


def test_the_node_returns_comfyuis_audio(door: str) -> None:
    node = NODE_CLASS_MAPPINGS["MilongaSoundEffect"]()
    inputs = node.INPUT_TYPES()["required"]
    assert set(inputs) == {"prompt", "seconds", "steps", "guidance", "seed", "server"}
    audio, seed = node.generate(PROMPT, 0.64, 1, 3.0, 7, door)
    assert (audio["sample_rate"], seed) == (16_000, 7)
    assert audio["waveform"].shape == (1, 1, round(0.64 * 16_000))
    assert audio["waveform"].dtype == torch.float32


def test_the_node_says_what_is_wrong(door: str) -> None:
    node = NODE_CLASS_MAPPINGS["MilongaSoundEffect"]()
    with pytest.raises(RuntimeError, match="audio_length: is 99 s"):
        node.generate(PROMPT, 99, 1, 3.0, 7, door)
    with pytest.raises(RuntimeError, match="does not answer"):
        node.generate(PROMPT, 1, 1, 3.0, 7, "http://127.0.0.1:1")


def test_the_node_says_that_an_address_is_no_web_doors(door: str, generating: Serving) -> None:
    node = NODE_CLASS_MAPPINGS["MilongaSoundEffect"]()
    for address in ("", "127.0.0.1:8080", "http://", f"http://{generating.target}"):
        with pytest.raises(RuntimeError, match="http://HOST:PORT"):
            node.generate(PROMPT, 1, 1, 3.0, 7, address)
    with pytest.raises(RuntimeError, match="there is no"):
        node.generate(PROMPT, 1, 1, 3.0, 7, f"{door}/v1")


class _Page(BaseHTTPRequestHandler):
    """What another server answers."""

    def do_POST(self) -> None:
        """Answer any request with a page."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *words: object) -> None:
        """Say nothing."""


def test_the_node_says_that_an_answer_is_no_clip() -> None:
    node = NODE_CLASS_MAPPINGS["MilongaSoundEffect"]()
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(RuntimeError, match="answers no clip"):
                node.generate(PROMPT, 1, 1, 3.0, 7, f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
