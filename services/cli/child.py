"""`python -m services.cli.child …`: the `milonga` command as a child process that stops with its parent.

The command sends itself SIGTERM when its standard input reaches end of file. The parent holds the other end
of that pipe, and the system closes it when the parent ends in any way, SIGKILL included.
"""

import os
import signal
import threading


def watch_parent() -> None:
    """Have this process get SIGTERM when its standard input ends."""
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    watch_parent()
    from services.cli import main

    main()
