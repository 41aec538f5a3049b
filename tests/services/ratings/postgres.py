"""A PostgreSQL server of the tests' own, where its programs are installed."""

import os
import shutil
import subprocess
from pathlib import Path

from services.processes import free_port


def _programs() -> Path | None:
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


PROGRAMS = _programs()
"""Folder of initdb and pg_ctl; None if PostgreSQL is not installed."""


class Postgres:
    """A server on a free port of this machine, with its data below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._data, self._port = folder / "data", free_port()
        # PostgreSQL refuses to run as root.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", str(self._data), "-U", "milonga", "--auth=trust", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://milonga@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        options = f"-p {self._port} -k {self._data} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self._data.parent / "log")
        self._run("pg_ctl", "-D", str(self._data), "-o", options, "-l", log, "-w", "-t", "120", "start")

    def stop(self) -> None:
        """Stop as a crash would."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *words: str) -> None:
        assert PROGRAMS is not None
        subprocess.run(
            [str(PROGRAMS / program), *words],
            user=self._user,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=180,
        )
