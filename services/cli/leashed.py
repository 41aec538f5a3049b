"""`python -m services.cli.leashed …`: the `milonga` command, on a leash that is its standard input.

When that ends, the command stops as by SIGTERM. Whoever starts it so holds the other end of a pipe, which
closes with them however they end, SIGKILL included: no service outlives the command that started it.
"""

import os
import signal
import threading


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_watch, name="leash", daemon=True).start()
    from services.cli import main

    main()
