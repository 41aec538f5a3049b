"""What the cluster test is driven by: kubectl and `milonga` as their users call them, and a transcript."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self, TextIO

import yaml  # type: ignore[import-untyped]

from benchmarks.load import Call, plot, summarize
from k8s.lint import TOOLS

ROOT: Final = Path(__file__).resolve().parents[2]
OUTPUT: Final = ROOT / "build" / "cluster"
"""Transcript, figures, and the load's calls and plot."""
NAMESPACE: Final = "milonga"
MILONGA: Final = Path(sys.executable).parent / "milonga"
KUBECTL: Final = TOOLS / "kubectl"

_TAIL: Final = 40


@dataclass(kw_only=True, slots=True)
class Transcript:
    """Every command with the end of what it said, its exit code and its time; and named figures."""

    file: TextIO
    begun: float = field(default_factory=time.monotonic)
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[Self]:
        """A transcript in `OUTPUT`."""
        OUTPUT.mkdir(parents=True, exist_ok=True)
        with (OUTPUT / "transcript.txt").open("w", encoding="utf-8", buffering=1) as file:
            file.write(f"# {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n")
            yield cls(file=file)

    def command(self, words: Sequence[str | Path]) -> None:
        """Note what is run."""
        names = [Path(word).name if isinstance(word, Path) else word for word in words]
        line = shlex.join(names).replace(f"{ROOT}/", "")
        self.file.write(f"\n[{time.monotonic() - self.begun:6.1f} s] $ {line}\n")

    def output(self, text: str, code: int, seconds: float) -> None:
        """Note how it ended."""
        lines = text.rstrip().splitlines()
        if len(lines) > _TAIL:
            lines = [f"… {len(lines) - _TAIL} lines", *lines[-_TAIL:]]
        self.file.writelines(f"  {line}\n" for line in lines)
        self.file.write(f"  (exit code {code}, {seconds:.1f} s)\n")

    def figure(self, name: str, value: float) -> None:
        """Note a figure, under its name in `figures.json`."""
        self.figures[name] = round(value, 2)
        self.file.write(f"  >> {name}: {value:.1f}\n")
        (OUTPUT / "figures.json").write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A command that ended."""

    code: int
    output: str
    seconds: float

    @property
    def error(self) -> str:
        """The line that says why it failed."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.output
        return errors[0]


class Running:
    """A command under way, read line by line."""

    def __init__(
        self, words: Sequence[str | Path], transcript: Transcript, environment: dict[str, str]
    ) -> None:
        transcript.command(words)
        self._transcript, self._start = transcript, time.monotonic()
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, text: str) -> str:
        """The next line with this in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)}")

    def finish(self, timeout: float = 900) -> Done:
        """Wait for its end."""
        output, _ = self.process.communicate(timeout=timeout)
        done = Done(
            code=self.process.returncode,
            output="".join(self.lines) + output,
            seconds=time.monotonic() - self._start,
        )
        self._transcript.output(done.output, done.code, done.seconds)
        return done


class Cluster:
    """The namespace that the test has to itself."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.environment = {
            **os.environ,
            "MILONGA_CACHE": str(OUTPUT / "cache"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
            "NO_COLOR": "1",
        }

    def start(self, *words: str | Path) -> Running:
        """Begin a command."""
        return Running(words, self.transcript, self.environment)

    def run(self, *words: str | Path, timeout: float = 900) -> Done:
        """Run a command to its end, whatever that is."""
        return self.start(*words).finish(timeout)

    def milonga(self, *words: str | Path, code: int = 0, timeout: float = 900) -> Done:
        """`milonga …`, which ends with this exit code."""
        done = self.run(MILONGA, *words, timeout=timeout)
        assert done.code == code, done.output
        return done

    def kubectl(self, *words: str | Path, timeout: float = 600) -> str:
        """`kubectl …`, which succeeds."""
        done = self.run(KUBECTL, *words, timeout=timeout)
        assert done.code == 0, done.output
        return done.output

    def get(self, *words: str) -> Any:
        """`kubectl get … -o json`, not in the transcript."""
        command: list[str | Path] = [KUBECTL, "-n", NAMESPACE, "get", *words, "-o", "json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def ready(self, *deployments: str, timeout: float = 600) -> None:
        """Wait until Deployments have their latest pods, and only these."""
        for name in deployments or ("--all",):
            command = (
                ("rollout", "status", f"deployment/{name}") if deployments else ("wait", "deployment", name)
            )
            condition = () if deployments else ("--for=condition=Available",)
            self.kubectl(
                "-n", NAMESPACE, *command, *condition, f"--timeout={timeout:.0f}s", timeout=timeout + 10
            )

    def pods(self, name: str) -> list[str]:
        """Names of the pods of a Deployment or Job that are not on their way out."""
        items = self.get("pods", "-l", f"app.kubernetes.io/name={name}")["items"]
        return [pod["metadata"]["name"] for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def create_job(self, name: str, changed: Callable[[str], str], **spec: int) -> None:
        """Create k8s/jobs/NAME.yaml with its arguments `changed`, and on any small node."""
        job = yaml.safe_load((ROOT / "k8s" / "jobs" / f"{name}.yaml").read_text(encoding="utf-8"))
        job["spec"] |= spec
        pod = job["spec"]["template"]["spec"]
        for placement in ("nodeSelector", "tolerations"):
            pod.pop(placement, None)
        (container,) = pod["containers"]
        container["args"] = [word for arg in container["args"] for word in changed(arg).split(" ")]
        container["resources"] = {
            "requests": {"cpu": "100m", "memory": "512Mi"},
            "limits": {"cpu": "1", "memory": "2Gi"},
        }
        path = OUTPUT / f"{name}.yaml"
        path.write_text(yaml.safe_dump(job), encoding="utf-8")
        self.kubectl("create", "-f", path)

    def wait_for_job(self, name: str, timeout: int = 600) -> None:
        """Wait until a Job is complete; say its log where it fails."""
        end = time.monotonic() + timeout
        while True:
            conditions = {one["type"] for one in self.get("job", name)["status"].get("conditions", ())}
            if "Complete" in conditions:
                return
            if "Failed" in conditions or time.monotonic() > end:
                raise AssertionError(self.kubectl("-n", NAMESPACE, "logs", f"job/{name}", "--tail=40"))
            time.sleep(1)

    def pin(self, deployment: str = "generation") -> str | None:
        """The pin of a Deployment."""
        template = self.get("deployment", deployment)["spec"]["template"]
        found: str | None = template["metadata"].get("annotations", {}).get("milonga.dev/pin")
        return found

    def challengers(self) -> int:
        """Replicas of the challenger."""
        return int(self.get("deployment", "challenger")["spec"]["replicas"])


@contextlib.contextmanager
def forwarded(cluster: Cluster, what: str, port: int) -> Iterator[str]:
    """A `kubectl port-forward`; yields the address here."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        local: int = probe.getsockname()[1]
    words: list[str | Path] = [KUBECTL, "-n", NAMESPACE, "port-forward", what, f"{local}:{port}"]
    cluster.transcript.command(words)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert "Forwarding from" in process.stdout.readline()
            yield f"127.0.0.1:{local}"
        finally:
            process.terminate()


class PodLoad:
    """`benchmarks/load.py` in a pod, retries off, health watched, through the headless Service."""

    RATE: Final = 2.0

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.marks: list[tuple[float, str]] = []
        """What happened when, in seconds of this machine's clock."""
        self._summary: dict[str, Any] = {}

    def start(self) -> None:
        """Begin, and return when answers come."""
        kubectl = self.cluster.kubectl
        kubectl(
            "-n", NAMESPACE, "create", "configmap", "load", f"--from-file={ROOT / 'benchmarks' / 'load.py'}"
        )  # fmt: skip
        kubectl("apply", "-f", Path(__file__).parent / "load.yaml")
        kubectl("-n", NAMESPACE, "wait", "pod/load", "--for=condition=Ready", "--timeout=120s")
        end = time.monotonic() + 120
        while len(self.calls()) < 3:
            assert time.monotonic() < end, "no answers come"
            time.sleep(1)

    def mark(self, what: str) -> None:
        """Note what happens now."""
        self.marks.append((time.time(), what))

    def calls(self) -> list[Call]:
        """All that have ended."""
        text = self._exec("cat", "/out/calls.jsonl")
        return [Call(**json.loads(line)) for line in text.splitlines() if line.endswith("}")]

    def stop(self) -> dict[str, Any]:
        """End it, once; the summary, which is written to `OUTPUT` with a plot."""
        if self._summary:
            return self._summary
        calls = self.calls()
        begun = float(self._exec("cat", "/out/begun"))
        marks = [(moment - begun, what) for moment, what in self.marks]
        summary = self._summary = summarize(calls, marks)
        (OUTPUT / "load.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        lines = "".join(
            json.dumps({"code": call.code, "error": call.error, "start": call.start}) + "\n"
            for call in calls
            if call.code != "OK"
        )
        (OUTPUT / "load-failures.jsonl").write_text(lines, encoding="utf-8")
        plot(calls, marks, OUTPUT / "load.png")
        self.cluster.kubectl(
            "-n", NAMESPACE, "delete", "pod/load", "configmap/load", "--grace-period=1", "--ignore-not-found"
        )
        return summary

    def _exec(self, *words: str) -> str:
        command: list[str | Path] = [KUBECTL, "-n", NAMESPACE, "exec", "load", "--", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def digest(pin: str | None) -> str:
    """The digest of a pin."""
    found = re.search(r"sha256:[0-9a-f]{64}", pin or "")
    assert found, pin
    return found[0]
