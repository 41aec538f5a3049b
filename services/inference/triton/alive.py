"""Whether a Triton and the processes of its models are alive: a liveness probe, from the same container.

    python3 -m services.inference.triton.alive --models 3 [--http 127.0.0.1:8000]

Triton 2.51 goes on calling a model ready whose Python process has died, and loading it again does not help:
it has to be unloaded before, or Triton restarted. Exit code 1, and a line that says why: something is dead.
"""

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

STUB: Final = b"triton_python_backend_stub"
"""Program of a Python model's process: at least one for each model."""
SECONDS: Final = 3.0


def dead(models: int, address: str, processes: Path = Path("/proc")) -> str:
    """What is dead, or nothing."""
    # Not by way of a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/v2/health/live", timeout=SECONDS):
            pass
    except (OSError, urllib.error.URLError) as error:
        return f"Triton does not answer at {address}: {error}"
    found = sum(map(_is_stub, processes.glob("[0-9]*/cmdline")))
    return "" if found >= models else f"{found} processes of models run, expected at least {models}"


def _is_stub(path: Path) -> bool:
    try:
        return Path(path.read_bytes().partition(b"\0")[0].decode(errors="replace")).name.encode() == STUB
    except OSError:  # it has just ended
        return False


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, required=True, help="how many models are loaded at least")
    parser.add_argument(
        "--http", default="127.0.0.1:8000", help="address of Triton's HTTP port (%(default)s)"
    )
    options = parser.parse_args()
    fault = dead(options.models, options.http)
    if fault:
        print(fault, file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
