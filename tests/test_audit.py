"""`make audit`: the list of packages, and what it says with and without a source of advisories."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[1]
SBOM: Final = ROOT / "build/audit/sbom.json"


@contextmanager
def advisories(vulnerable: str | None) -> Iterator[str]:
    """Serve OSV's API with one advisory, of the package `vulnerable`; yield the address."""
    fault = {"id": "PYSEC-0000-1", "modified": "2026-01-01T00:00:00Z"}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["queries"]
            self._send({"results": [{"vulns": [fault]} if _name(one) == vulnerable else {} for one in asked]})

        def do_GET(self) -> None:
            affected = {"package": {"ecosystem": "PyPI", "name": vulnerable}, "versions": []}
            self._send({"schema_version": "1.6.0", "summary": "made up", "affected": [affected], **fault})

        def _send(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def _name(query: Any) -> str:
    return str(query["package"]["name"])


def audit(url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `make audit` in the environment that is there, whatever its age."""
    kept = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        ["make", "-o", ".venv/.milonga-ready", "audit", f"AUDIT_ARGS=--service-url={url}"],
        cwd=ROOT, env={**kept, "UV_HTTP_RETRIES": "0", "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_every_locked_package_is_listed_with_its_digests() -> None:
    with advisories(None) as url:
        done = audit(url)
    assert done.returncode == 0, done.stderr
    found = json.loads(SBOM.read_text(encoding="utf-8"))
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.5")
    names = {one["name"] for one in found["components"]}
    assert {"grpcio", "torch", "mlflow", "boto3", "mkdocs-material"} <= names
    assert f"{len(found['components'])} packages" in done.stdout
    for one in found["components"]:
        assert one["purl"].startswith("pkg:pypi/")
        assert all(len(source["hashes"][0]["content"]) == 64 for source in one["externalReferences"])


@pytest.mark.parametrize(("package", "code"), [("grpcio", 2), ("laion-clap", 2), ("no-such-package", 0)])
def test_a_known_vulnerability_is_named(package: str, code: int) -> None:
    """An error of make is its exit status 2."""
    with advisories(package) as url:
        done = audit(url)
    assert done.returncode == code, done.stderr
    assert ("PYSEC-0000-1" in done.stdout + done.stderr) is bool(code)
    assert "NOT COMPARED" not in done.stdout


@pytest.mark.parametrize(("ci", "code"), [({}, 0), ({"CI": "true"}, 2)])
def test_without_a_source_it_says_that_nothing_was_compared(ci: dict[str, str], code: int) -> None:
    done = audit("http://127.0.0.1:9/", **ci)
    assert done.returncode == code
    assert "NOT COMPARED" in done.stdout
    assert SBOM.exists()


def test_actions_are_pinned_by_digest() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r"  # v[\d.]+", comment), comment
