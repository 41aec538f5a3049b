"""`milonga promote` from the command line: what it refuses, and with which exit code."""

import json
import os
import signal
from pathlib import Path

import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.cli import run
from services.inference.triton.repository import Exported, ModelRepository, Weights, open_storage
from tests.training.promotion.fixtures import MemoryTarget, make_parts, make_version
from training.commands.promote import _termination_interrupts
from training.promotion.promote import bootstrap
from training.promotion.registry import Registry

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: none, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: none, context: {cluster: none, user: none}}]
users: [{name: none, user: {}}]
current-context: none
"""


@pytest.fixture
def nowhere(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registry, and a kubeconfig whose cluster does not answer."""
    (tmp_path / "config").write_text(KUBECONFIG)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    for name in ("MILONGA_OPERATOR_TOKEN", "MILONGA_OPERATOR_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    return store


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--rollback", "--history"], 2, "--rollback and --history: exclude each other"),
        (["--context", "kind-x", "--resume"], 2, "--context: is kind-x: no cluster can be chosen"),
        (["--resume"], 6, "the cluster http://127.0.0.1:1 can't be reached: "),
        (["--version", "7"], 6, "can't be reached"),
        (["--gates", "none.toml", "--version", "7"], 2, "--gates: none.toml can't be read: No such file"),
        (["--target", "local", "--rollback"], 2, "--operator-token-file: is missing; start the service with"),
        (["--bootstrap", "models:/milonga-tango@champion"], 2, "milonga-tango has no alias champion"),
        (["--bootstrap", "nonsense"], 2, "must be mini"),
        (["--target", "docker"], 2, "--target: is 'docker', must be kubernetes, local or triton://HOST:PORT"),
        (["--target", "triton://"], 2, "--repository: is missing"),
        (["--target", "triton://a:b", "--repository", "models"], 2, "--target: is 'triton://a:b', must be"),
        (["--target", "triton://127.0.0.1:1"], 2, "--repository: is missing; give the model repository"),
        (["--repository", "models", "--rollback"], 2, "--repository: is of a Triton, and --target is kub"),
        (
            ["--target", "triton://127.0.0.1:1", "--repository", "gs://models"],
            *(2, "--repository: is 'gs://models', must be a folder, s3://BUCKET/PREFIX"),
        ),
        (
            ["--target", "triton://127.0.0.1:1", "--repository", "empty", "--rollback"],
            *(2, "--repository: empty has no tango with a pinned version; `milonga triton export`"),
        ),
        (["--tls", "--tls-ca", "none.pem", "--target", "local", "--rollback"], 2, "--operator-token-file"),
    ],
)
def test_what_is_wrong_is_one_line(
    nowhere: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert run(["promote", *words]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_local_service_that_is_not_there(
    nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("MILONGA_OPERATOR_TOKEN_FILE", str(tmp_path / "token"))
    words = ["--target", "local", "--generation-address", "127.0.0.1:1", "--rollback"]
    assert run(["promote", *words]) == 6
    assert "127.0.0.1:1: " in capsys.readouterr().err


def test_a_triton_that_is_not_there(nowhere: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    version = make_version(registry, tmp_path)
    weights = Weights(name=version.name, version="1", digest=version.digest, folder=tmp_path / "run-0")
    model = Exported(config=ModelConfig(name="tango"), code="# none\n", weights={"tango": weights})
    ModelRepository(open_storage(str(tmp_path / "repository"))).add(model, 1)
    words = ["--target", "triton://127.0.0.1:1", "--repository", str(tmp_path / "repository")]
    assert run(["promote", *words, "--bootstrap", f"models:/{version.name}/1"]) == 6
    assert "the Triton at 127.0.0.1:1: " in capsys.readouterr().err


def test_the_ledger_is_printed(nowhere: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    version = make_version(registry, tmp_path)
    bootstrap(version, make_parts(MemoryTarget(), registry)[0])
    assert run(["promote", "--history", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["kind"], entry["from"], entry["to"]) == ("bootstrap", None, version.pin)
    assert (entry["outcome"], entry["place"]) == ("bootstrapped", "memory/test")
    assert run(["promote", "--history"]) == 0
    assert "nothing  milonga-tango/1  bootstrapped" in capsys.readouterr().out


def test_termination_undoes_as_an_interruption_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _termination_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
