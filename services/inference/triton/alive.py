"""Liveness probe of a Triton container: check Triton and the Python processes of its models.

    python3 -m services.inference.triton.alive --models 3 [--http 127.0.0.1:8000]

Triton 2.51 still reports a model as ready after its Python process has died, and loading it again does not
help: the model must be unloaded first, or Triton restarted. Exit code 1, with the reason on stderr, if Triton
or a model's process is dead.
"""

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

STUB: Final = b"triton_python_backend_stub"
"""Program of a Python model's process; each model has at least one."""
SECONDS: Final = 3.0
"""Timeout of the HTTP request."""


def find_fault(models: int, address: str, processes: Path = Path("/proc")) -> str:
    """Return why Triton at `address`, or one of its `models` models, is dead; an empty string if none is."""
    # Without a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/v2/health/live", timeout=SECONDS):
            pass
    except (OSError, urllib.error.URLError) as error:
        return f"Triton does not answer at {address}: {error}"
    found = sum(map(_is_stub, processes.glob("[0-9]*/cmdline")))
    return "" if found >= models else f"{found} model processes are running, expected at least {models}"


def _is_stub(path: Path) -> bool:
    try:
        return Path(path.read_bytes().partition(b"\0")[0].decode(errors="replace")).name.encode() == STUB
    except OSError:  # the process has just ended
        return False


def main() -> int:
    """Run the probe; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, required=True, help="minimum number of loaded models")
    parser.add_argument(
        "--http", default="127.0.0.1:8000", help="address of Triton's HTTP port (%(default)s)"
    )
    options = parser.parse_args()
    fault = find_fault(options.models, options.http)
    if fault:
        print(fault, file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
