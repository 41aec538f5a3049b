"""A real Triton, on CPU, from the wheel of nvidia-pytriton: its programs alone, nothing of its Python."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton

from services.processes import free_port

ENVIRONMENT = Path(__file__).parents[2] / ".venv-triton"
"""Made by `make test-triton`: the wheel, our models' libraries, numpy below 2."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
READY_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A server that runs."""

    grpc: str
    """Address of its gRPC port."""
    http: str
    metrics: str
    log: Path
    """What it and the models print."""
    process: subprocess.Popen[bytes]


def backends(folder: Path) -> Path:
    """Lay out Triton's Python backend as the server looks for it, with the stub of our Python."""
    packages = ENVIRONMENT / "lib" / f"python{PYTHON}" / "site-packages"
    source = packages / "pytriton" / "tritonserver"
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not there; run: make test-triton")
    target = folder / "python"
    shutil.copytree(source / "backends" / "python", target)
    shutil.copy(source / "python_backend_stubs" / PYTHON / "triton_python_backend_stub", target)
    (target / "triton_python_backend_stub").chmod(0o755)
    (source / "bin" / "tritonserver").chmod(0o755)
    return folder


@contextmanager
def running(
    repository: str | Path, folder: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A Triton on free ports with every model of `repository`, or those of `flags`; stopped at the end.

    Args:
        repository: its model repository.
        folder: an empty folder for its backend and its log.
        flags: further ones of tritonserver; any ``--load-model`` among them replaces the ``*``.
        environment: variables in addition to those of this process.
    """
    packages = ENVIRONMENT / "lib" / f"python{PYTHON}" / "site-packages"
    ports = [free_port() for _ in range(3)]
    grpc, http, metrics = (f"127.0.0.1:{port}" for port in ports)
    python = ENVIRONMENT / "bin" / "python"
    libraries = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    command = [
        str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends(folder / 'backends')}",
        "--model-control-mode=explicit",
        "--strict-readiness=false",
        *(f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports, strict=True)),
        *(f"--{name}-address=127.0.0.1" for name in ("grpc", "http", "metrics")),
        *([] if any(flag.startswith("--load-model") for flag in flags) else ["--load-model=*"]),
        *flags,
    ]
    variables = {
        **os.environ,
        # The stub finds its packages as this environment's Python does; libpython before the wheel's own.
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(ENVIRONMENT),
        "LD_LIBRARY_PATH": f"{libraries}:{packages / 'nvidia_pytriton.libs'}",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    variables.pop("PYTHONPATH", None)
    log = folder / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    try:
        server = Server(grpc=grpc, http=http, metrics=metrics, log=log, process=process)
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server) -> None:
    """Until it answers: then the models that could be loaded are."""
    end = time.monotonic() + READY_SECONDS
    with triton.InferenceServerClient(server.grpc) as client:
        while True:
            try:
                if client.is_server_ready():
                    return
            except triton.InferenceServerException:
                pass
            if server.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Triton did not come up:\n{server.log.read_text()[-4000:]}")
            time.sleep(0.1)


def index(client: triton.InferenceServerClient) -> dict[tuple[str, str], Any]:
    """What its repository index says: state and reason, by model and version."""
    models = client.get_model_repository_index().models
    return {(one.name, one.version): (one.state, one.reason) for one in models}
