"""What the benchmarks share: the clock, memory, services on free ports, and the report."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.processes import ServicePlan, free_port

PROMPT = "A dog barks then a siren wails"
RATE = 16_000
"""Sampling rate of `noise_clips` in Hz."""


def seconds(act: Callable[[], object]) -> float:
    """Return the wall-clock time of a call."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def memory_mib(pid: int | str = "self") -> dict[str, float]:
    """Return the resident (VmRSS) and peak (VmHWM) memory of a process in MiB (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    rows = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(rows[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """Return the name of the GPU, else the number of cores and the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, by name, for reports: nobody has to type them."""
    return {name: version(name) for name in packages}


def service_plan(name: str, *arguments: str) -> ServicePlan:
    """Return the plan of a service on a free port."""
    return ServicePlan(name=name, arguments=arguments, address=f"127.0.0.1:{free_port()}")


def noise_clips(count: int) -> list[NDArray[np.float32]]:
    """Return clips of 2.56 s of noise, all different: what they sound like changes no cost."""
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(int(2.56 * RATE))).astype(np.float32) for _ in range(count)]


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
