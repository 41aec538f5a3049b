"""`milonga serve` and `milonga up` as a person meets them: their help, and real processes on tiny models."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from milonga.v1 import reward_pb2, reward_pb2_grpc
from services import cli
from services.catalogue import CATALOGUE, ServiceEntry
from services.cli import up
from services.cli.options import flag_of, read_options, read_pairs
from services.cli.serve import service_of
from services.errors import InvalidInputError, OutputError, ServiceUnavailableError
from services.processes import ServicePlan, ServiceProcess, free_port, running, stop
from services.runtime.settings import load_settings
from tests.programs import environment
from tests.services.reward.serving import write_models
from tests.tiny import tiny_pipeline
from tests.waiting import until


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    generation: str
    clap: str
    reward: str

    @property
    def flags(self) -> list[str]:
        """Of `milonga up`."""
        models = ["--generation", self.generation, "--reward", self.reward, "--clap", self.clap]
        return [*models, "--scorer", f"a={self.clap}", "--scorer", f"b={self.clap}"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """URIs of tiny models."""
    folder = tmp_path_factory.mktemp("models")
    clap, reward = write_models(folder)
    tiny_pipeline().save_pretrained(folder / "tango")
    return Models(generation=f"file:{folder}/tango", clap=f"file:{clap}", reward=f"file:{reward}")


# milonga serve


OLD_OPTIONS = {
    "generation": (
        "--model",
        "--unpinned-model",
        "--dtype",
        "--exact",
        "--no-exact",
        "--operator-token-file",
    ),
    "scoring": ("--scorer",),
    "reward": ("--model", "--clap"),
}
"""Options that users' scripts have, by service."""
SHARED_OPTIONS = (
    *("--listen", "--device", "--metrics-port", "--health-port", "--tls-cert-file", "--tls-key-file"),
    *("--tls-client-ca-file", "--drain-delay-seconds", "--grace-seconds", "--log-format", "--log-level"),
)


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_every_setting_is_an_option_with_its_docstring(
    entry: ServiceEntry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.run(["serve", entry.name, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for option in (*SHARED_OPTIONS, *OLD_OPTIONS.get(entry.name, ())):
        assert f" {option} " in out
    settings = service_of(entry.name).settings
    assert settings.model_fields["listen"].default == entry.listen
    assert entry.listen in out
    for name in settings.model_fields:
        # Secrets are the environment's alone, which the end of the help says.
        assert f" {flag_of(settings, name)} " in out or f"MILONGA_{name.upper()} has no option" in out
    assert "With --tls-key-file, the service uses TLS, otherwise plaintext." in out
    assert "`" not in out


@pytest.mark.parametrize("name", CATALOGUE)
def test_options_and_environment_mean_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = service_of(name).settings
    texts = {
        "listen": "127.0.0.1:7000",
        "metrics_port": "0",
        "device": "cpu",
        "threads": "2",
        "log_level": "error",
        "grace_seconds": "1.5",
        "model": "mini",
        "clap": "mini:clap-b",
        "dtype": "bfloat16",
        "batch_shapes": "[2, 4]",
        "exact": "true",
        "scorers": '{"a": "mini:clap-a"}',
    }
    texts = {setting: text for setting, text in texts.items() if setting in kind.model_fields}
    values: dict[str, object] = {**texts}
    values |= {"scorers": ["a=mini:clap-a"]} if "scorers" in texts else {}
    values |= {"exact": True} if "exact" in texts else {}
    given = read_options(kind, values)
    for setting, text in texts.items():
        monkeypatch.setenv(f"MILONGA_{setting.upper()}", text)
    assert load_settings(kind) == given
    assert given.listen == "127.0.0.1:7000"


@pytest.mark.parametrize(
    ("arguments", "imported"),
    [(["serve", "--help"], []), (["serve", "reward", "--help"], ["pydantic_settings"])],
)
def test_help_imports_little(arguments: list[str], imported: list[str]) -> None:
    code = (
        f"import sys; from services.cli import run; code = run({arguments!r}); "
        "print([code, *(one for one in ('torch', 'pydantic_settings') if one in sys.modules)])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str([0, *imported])


def test_scorers_are_read_by_name() -> None:
    pairs = read_pairs("--scorer", ["a=mini:clap-a", "b=laion:/x=y.pt"])
    assert pairs == {"a": "mini:clap-a", "b": "laion:/x=y.pt"}
    with pytest.raises(InvalidInputError) as caught:
        read_pairs("--scorer", ["mini:clap-a", "=x", "a=", "b=1", "b=2"])
    assert [fault.field for fault in caught.value.violations] == ["--scorer"] * 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scoring"], "--scorer"),
        (["scoring", "--scorer", "mini"], "NAME=URI"),
        (["scoring", "--scorer", "a=nonsense"], "nonsense"),
        (["reward"], "--model"),
        (["reward", "--model", "nonsense"], "nonsense"),
        (["reward", "--model", "mini", "--clap", "nonsense"], "clap: is"),
        (["reward", "--model", "mini", "--listen", "x"], "listen"),
        (["reward", "--model", "mini", "--max-batch-size", "0"], "max_batch_size: is 0: "),
        (
            ["generation", "--model", "mini", "--dtype", "float8", "--grace-seconds", "-1"],
            "dtype: is 'float8'",
        ),
        (["generation", "--model", "mini", "--batch-shapes", "1,2"], "batch_shapes"),
        (["generation", "--model", "mini", "--batch-shapes", "[4, 2]"], "must be ascending"),
    ],
)
def test_what_a_service_refuses_is_one_line_and_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line


# Processes


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended may still be listed until it is waited for."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.strip().startswith("Z")


def children_of(pid: int) -> dict[str, int]:
    """Process ids of the services that a process started, by name."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True
    ).stdout
    found = {}
    for line in listing.splitlines():
        child, parent, *words = line.split()
        if parent == str(pid) and "services.cli.child" in words:
            found[words[words.index("serve") + 1]] = int(child)
    return found


def test_a_service_that_does_not_start_tells_why(models: Models, tmp_path: Path) -> None:
    plan = ServicePlan(
        name="reward", arguments=("--model", "file:nowhere"), address=f"127.0.0.1:{free_port()}"
    )
    with running([plan], logs=tmp_path, environment=environment()) as (service,):
        with pytest.raises(ServiceUnavailableError, match=r"exit code 2 .*reward\.log.*nowhere"):
            service.wait_until_serving()
        assert not service.running
    assert "nowhere" in (tmp_path / "reward.log").read_text()


def test_an_error_stops_what_was_started(models: Models) -> None:
    plan = ServicePlan(
        name="reward", arguments=("--model", models.reward), address=f"127.0.0.1:{free_port()}"
    )

    def fail() -> None:
        with running([plan], environment=environment()) as services:
            started.extend(service.process.pid for service in services)
            raise KeyboardInterrupt

    started: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not alive(started[0])


def test_a_service_that_does_not_stop_is_stopped_by_force(models: Models) -> None:
    plan = ServicePlan(
        name="reward", arguments=("--model", models.reward), address=f"127.0.0.1:{free_port()}"
    )
    service = ServiceProcess(plan, environment=environment())
    os.kill(service.process.pid, signal.SIGSTOP)
    stop([service], seconds=0.3)
    # Woken to be killed, it may meet the SIGTERM first.
    assert service.process.returncode in (-signal.SIGKILL, -signal.SIGTERM)


def test_a_log_that_cannot_be_written_starts_nothing(tmp_path: Path) -> None:
    plan = ServicePlan(name="reward", arguments=(), address="127.0.0.1:1")
    with pytest.raises(OutputError, match="nowhere"), running([plan], logs=tmp_path / "nowhere"):
        pass


# milonga up


@dataclass(frozen=True, kw_only=True, slots=True)
class Up:
    process: "subprocess.Popen[str]"
    children: Mapping[str, int]
    port: int


@contextmanager
def running_up(*arguments: str) -> Iterator[Up]:
    """Run `milonga up`; nothing of it is left after the test."""
    port = free_port(len(CATALOGUE))
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up", "--port", str(port), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children: dict[str, int] = {}
    try:
        while len(children) < len(CATALOGUE) and process.poll() is None:
            children |= children_of(process.pid)
        yield Up(process=process, children=children, port=port)
    finally:
        process.kill()
        process.communicate()
        for pid in children.values():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_up_serves_all_three_and_one_ctrl_c_stops_them(models: Models) -> None:
    with running_up(*models.flags) as running_one:
        out = running_one.process.stdout
        assert out is not None
        ready = [out.readline() for _ in CATALOGUE]
        assert {line.split()[0] for line in ready} == {*CATALOGUE}
        for line in ready:
            name, address, *_ = line.split()
            assert address == f"127.0.0.1:{running_one.port + list(CATALOGUE).index(name)}"
            assert "ready after" in line
        hint = out.readline()
        for offset, flag in enumerate(("--server", "--scoring", "--reward-server")):
            assert f"{flag} 127.0.0.1:{running_one.port + offset}" in hint
        with grpc.insecure_channel(f"127.0.0.1:{running_one.port + 2}") as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            assert stub.GetRewardModel(reward_pb2.GetRewardModelRequest()).model.name == "tiny-reward"
        running_one.process.send_signal(signal.SIGINT)
        _, err = running_one.process.communicate(timeout=60)
        assert running_one.process.returncode == 0, err
        assert [name for name, pid in running_one.children.items() if alive(pid)] == []
    # Each drained by itself, and its log came through under its name.
    for name in CATALOGUE:
        assert any(line.startswith(f"{name}: ") and '"stopped"' in line for line in err.splitlines())


def test_up_puts_the_web_door_in_front(models: Models) -> None:
    door = free_port()
    with running_up(*models.flags, "--web-port", str(door)) as running_one:
        out = running_one.process.stdout
        assert out is not None
        ready = {line.split()[0]: line for line in (out.readline() for _ in (*CATALOGUE, "web"))}
        assert set(ready) == {*CATALOGUE, "web"}
        assert f"http://127.0.0.1:{door}/docs" in ready["web"]
        assert f"curl 127.0.0.1:{door}/v1/audio/generate" in out.readline()
        assert out.readline() == f"studio: http://127.0.0.1:{door}\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{door}/", timeout=60) as response:
            assert "Milonga studio" in response.read().decode()
        with urllib.request.urlopen(f"http://127.0.0.1:{door}/health", timeout=60) as response:
            assert set(json.load(response)["services"]) == {*CATALOGUE}
        running_one.process.send_signal(signal.SIGINT)
        _, err = running_one.process.communicate(timeout=60)
        assert running_one.process.returncode == 0, err
    assert any(line.startswith("web: ") and '"stopped"' in line for line in err.splitlines())


def test_a_service_that_dies_takes_the_others_with_it(models: Models, tmp_path: Path) -> None:
    with running_up(*models.flags, "--log-dir", str(tmp_path / "logs")) as running_one:
        assert len(running_one.children) == len(CATALOGUE)
        os.kill(running_one.children["scoring"], signal.SIGKILL)
        _, err = running_one.process.communicate(timeout=60)
        assert running_one.process.returncode == 1, err
        assert [name for name, pid in running_one.children.items() if alive(pid)] == []
    assert "error: the scoring service was killed by SIGKILL" in err
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"{name}.log" for name in CATALOGUE}


def test_a_model_that_is_refused_ends_up_with_2_and_says_so(models: Models) -> None:
    with running_up(*models.flags, "--reward", "file:nowhere") as running_one:
        _, err = running_one.process.communicate(timeout=60)
        assert running_one.process.returncode == 2, err
        assert [name for name, pid in running_one.children.items() if alive(pid)] == []
    last = err.splitlines()[-1]
    assert last.startswith("error: the reward service ended by itself with exit code 2: ")
    assert "nowhere" in last


def test_ctrl_c_while_they_start_leaves_nothing(models: Models) -> None:
    with running_up(*models.flags) as running_one:
        running_one.process.send_signal(signal.SIGINT)
        _, err = running_one.process.communicate(timeout=60)
        assert running_one.process.returncode == 0, err
        assert [name for name, pid in running_one.children.items() if alive(pid)] == []


def test_a_second_ctrl_c_ends_what_does_not_stop(models: Models) -> None:
    with running_up(*models.flags) as running_one:
        stuck = running_one.children["reward"]
        os.kill(stuck, signal.SIGSTOP)
        running_one.process.send_signal(signal.SIGINT)
        others = [running_one.children[name] for name in ("generation", "scoring")]
        until(lambda: not any(alive(pid) for pid in others))
        assert running_one.process.poll() is None
        running_one.process.send_signal(signal.SIGINT)
        _, err = running_one.process.communicate(timeout=60)
        assert running_one.process.returncode == 130, err
        assert not alive(stuck)


def test_nothing_outlives_up_even_if_that_is_killed(models: Models) -> None:
    with running_up(*models.flags) as running_one:
        assert len(running_one.children) == len(CATALOGUE)
        running_one.process.kill()
        until(lambda: not any(alive(pid) for pid in running_one.children.values()))


def test_wrong_flags_start_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    first = free_port(len(CATALOGUE))
    with socket.create_server(("127.0.0.1", first + 1)):
        assert cli.run(["up", "--port", str(first)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --port: can't listen on 127.0.0.1:{first + 1}")
    assert cli.run(["up", "--generation", "x", "--scorer", "a=y", "--reward", "z", "--clap", "w"]) == 2
    err = capsys.readouterr().err
    for flag in ("--generation:", "--scorer:", "--reward:", "--clap:"):
        assert flag in err
    assert len(err.splitlines()) == 1
    assert cli.run(["up", "--port", "65534"]) == 2


def test_services_get_the_environment_without_what_they_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "LISTEN", "METRICS_PORT", "HEALTH_PORT", "SCORERS", "TLS_CERT_FILE", "DEVICE"):
        monkeypatch.setenv(f"MILONGA_{name}", "x")
    environment = up._environment(None)
    assert {name for name in environment if name.startswith("MILONGA_")} == {"MILONGA_DEVICE"}
