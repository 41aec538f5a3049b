"""The command line of `milonga promote`: errors and exit codes."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.cli import run
from services.inference.triton.repository import ModelExport, ModelRepository, Weights, open_storage
from tests.training.promotion.fixtures import MemoryTarget, make_promoter, make_version
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


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


TRITON = ["--target", "triton://127.0.0.1:1"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["resume", "--context", "kind-x"], 2, "--context: is kind-x: no cluster can be chosen"),
        (["resume"], 6, "the cluster http://127.0.0.1:1 can't be reached: "),
        (["run", "--version", "7"], 6, "can't be reached"),
        (["run", "--gates", "none.toml"], 2, "--gates: none.toml can't be read: No such file"),
        (["rollback", "--target", "local"], 2, "--operator-token-file: is missing; start the service with"),
        (["bootstrap", "models:/milonga-tango@champion"], 2, "milonga-tango has no alias champion"),
        (["bootstrap", "nonsense"], 2, "must be mini"),
        (["run", "--target", "docker"], 2, "--target: is 'docker', must be kubernetes, local or triton://"),
        (["run", "--scoring", "http://h:1"], 2, "--scoring: is 'http://h:1', a URL; give h:1"),
        (["run", "--reward-server", "h"], 2, "--reward-server: is 'h', which has no port; give"),
        (["run", "--challenger-address", "h"], 2, "--challenger-address: is 'h', which has no port; give"),
        (["run", "--generation-address", "h:x"], 2, "--generation-address: is 'h:x', with the port 'x'"),
        (["run", "--target", "triton://"], 2, "--repository: is missing"),
        (["run", "--target", "triton://a:b", "--repository", "m"], 2, "--target: is 'triton://a:b', must be"),
        (["run", *TRITON], 2, "--repository: is missing; give the model repository"),
        (["rollback", "--repository", "models"], 2, "--repository: is for Triton, and --target is kub"),
        (["run", *TRITON, "--repository", "gs://m"], 2, "--repository: is 'gs://m', must be a folder, s3://"),
        (
            ["rollback", *TRITON, "--repository", "empty"],
            *(2, "--repository: empty has no tango with a pinned version; `milonga triton export`"),
        ),
        (["rollback", "--tls", "--tls-ca", "none.pem", "--target", "local"], 2, "--operator-token-file"),
    ],
)
def test_wrong_input_is_one_line(
    nowhere: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert run(["promote", *words]) == code
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rollback", "--rollback: is now a command: milonga promote rollback"),
        ("-n x --resume", "--resume: is now a command: milonga promote resume -n x"),
        ("--json --history", "--history: is now a command: milonga promote history --json"),
        ("--bootstrap mini-base --alias b", "a command: milonga promote bootstrap mini-base --alias b"),
        ("--bootstrap=mini-base", "--bootstrap: is now a command: milonga promote bootstrap mini-base"),
        ("--model=m --gates g.toml", "option of a command: milonga promote run --model=m --gates g.toml"),
    ],
)
def test_a_former_flag_names_the_command_that_replaces_it(
    capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert run(["promote", *words.split()]) == 2
    assert error_line(capsys).endswith(message)


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["promote"]) == 2
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert all(command in shown for command in ("run", "rollback", "history", "resume", "bootstrap"))


def test_the_job_of_the_manifest_and_the_one_that_resumes_it_are_commands(
    nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Path(__file__).parents[3] / "k8s" / "jobs" / "promote.yaml"
    (script,) = re.findall(r"sed '(.+)' k8s/jobs/promote.yaml", manifest.read_text())
    resuming = subprocess.run(["sed", script, manifest], capture_output=True, text=True, check=True).stdout
    for text, name, command in (
        (manifest.read_text(), "promote", ["promote", "run", "--model=milonga-tango"]),
        (resuming, "resume", ["promote", "resume"]),
    ):
        job = yaml.safe_load(text)
        assert job["metadata"]["name"] == name
        assert job["spec"]["template"]["spec"]["containers"][0]["args"] == command
        assert run(command) == 6
        assert "the cluster http://127.0.0.1:1 can't be reached: " in error_line(capsys)


def test_a_local_service_that_is_not_there(
    nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("MILONGA_OPERATOR_TOKEN_FILE", str(tmp_path / "token"))
    words = ["--target", "local", "--generation-address", "127.0.0.1:1"]
    assert run(["promote", "rollback", *words]) == 6
    assert "127.0.0.1:1: " in capsys.readouterr().err


def test_a_triton_that_is_not_there(nowhere: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    version = make_version(registry, tmp_path)
    weights = Weights(name=version.name, version="1", digest=version.digest, folder=tmp_path / "run-0")
    model = ModelExport(config=ModelConfig(name="tango"), code="# none\n", weights={"tango": weights})
    ModelRepository(open_storage(str(tmp_path / "repository"))).add(model, 1)
    words = [*TRITON, "--repository", str(tmp_path / "repository")]
    assert run(["promote", "bootstrap", f"models:/{version.name}/1", *words]) == 6
    assert "the Triton at 127.0.0.1:1: " in capsys.readouterr().err


def test_the_history_is_printed(nowhere: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    version = make_version(registry, tmp_path)
    bootstrap(make_promoter(MemoryTarget(), registry)[0], version)
    assert run(["promote", "history", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["kind"], entry["from"], entry["to"]) == ("bootstrap", None, version.uri)
    assert (entry["outcome"], entry["place"]) == ("bootstrapped", "memory/test")
    assert run(["promote", "history"]) == 0
    assert "nothing  milonga-tango/1  bootstrapped" in capsys.readouterr().out


def test_sigterm_interrupts_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _termination_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
