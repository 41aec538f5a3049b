"""`milonga token`, and a service whose callers it names."""

import subprocess
import sys
from pathlib import Path

import pytest

from services import cli
from services.processes import ServicePlan, free_port, running
from services.runtime.callers_file import read_callers
from services.runtime.quotas import Quota
from services.runtime.tokens import read_token, token_digest
from tests.programs import environment
from tests.tiny import tiny_pipeline
from tests.waiting import until


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_writes_a_token_for_its_owner_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callers = tmp_path / "callers.toml"
    for words in (
        ["studio"],
        ["farm.1", "--role", "batch", "--role", "observer", "-o", "farm", "--work-per-minute", "1e6"],
        ["99", "--calls-per-minute", "2.5"],
    ):
        assert cli.run(["token", *words]) == 0
    out, err = capsys.readouterr()
    callers.write_text(out)
    table = read_callers(callers)
    for name, file, roles, quota in (
        ("studio", "studio.token", {"caller"}, Quota()),
        ("farm.1", "farm", {"batch", "observer"}, Quota(work_per_minute=1e6)),
        ("99", "99.token", {"caller"}, Quota(calls_per_minute=2.5)),
    ):
        assert Path(file).stat().st_mode & 0o777 == 0o600
        secret = read_token("token", Path(file))
        found = table.by_token(token_digest(secret))
        assert found is not None
        assert (found.usage.name, sorted(found.roles)) == (name, sorted(roles))
        assert found.usage.quota == quota
        assert secret not in out + err
        assert file in err


def test_a_token_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("studio.token").write_text("precious")
    assert cli.run(["token", "studio"]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert Path("studio.token").read_text() == "precious"
    assert cli.run(["token", "studio", "-o", "absent/studio.token"]) == 4


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["a b"], "NAME: is 'a b'"),
        (["ipv4:10.0.0.7"], "NAME: is"),
        (["-o", "x", ""], "NAME: is ''"),
        (["a", "--role", "root"], "--role: is 'root', must be one of caller"),
        (["a", "--calls-per-minute", "0"], "--calls-per-minute: is 0"),
        (["a", "--work-per-minute", "inf"], "--work-per-minute: is inf"),
        (["a", "--work-per-minute", "nan"], "--work-per-minute: is nan"),
    ],
)
def test_what_the_file_would_not_take_is_refused_before_a_token_is_made(
    words: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["token", *words]) == 2
    assert field in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_a_service_of_callers_with_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: the command makes the token, the service reads the table, the command calls it."""
    tiny_pipeline().save_pretrained(tmp_path / "tango")
    assert cli.run(["token", "studio"]) == 0
    (tmp_path / "callers.toml").write_text(capsys.readouterr().out)
    plan = ServicePlan(
        name="generation",
        arguments=("--model", f"file:{tmp_path}/tango", "--callers-file", str(tmp_path / "callers.toml")),
        address=f"127.0.0.1:{free_port()}",
    )
    with running([plan], logs=tmp_path, environment=environment()) as (service,):
        until(lambda: service.is_serving())
        words = ["generate", "a dog barks", "--server", service.target, "--steps", "1", "-q"]
        assert cli.run(words) == 2
        assert "takes calls only from callers that it knows" in capsys.readouterr().err
        assert cli.run([*words, "--token-file", "studio.token"]) == 0
        (tmp_path / "wrong.token").write_text("wrong")
        assert cli.run([*words, "--token-file", "wrong.token"]) == 2
        assert "the token is not known" in capsys.readouterr().err
        assert cli.run([*words, "--token-file", "absent.token"]) == 2
        assert "--token-file: is absent.token, which can't be read" in capsys.readouterr().err


def test_a_service_that_others_reach_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "serve", "generation", "--model=mini", "--listen=0.0.0.0:0"],
        env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--callers-file or --tls-client-ca-file, or --anonymous allowed" in done.stderr


def test_a_token_file_of_the_environment_is_no_option_that_needs_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILONGA_TOKEN_FILE", str(tmp_path / "absent"))
    tiny_pipeline().save_pretrained(tmp_path / "tango")
    words = ["generate", "a dog barks", "--model", f"file:{tmp_path}/tango", "--steps", "1", "-q"]
    assert cli.run(words) == 0
    assert cli.run([*words, "--token-file", "x"]) == 2
    assert "--token-file" in capsys.readouterr().err
