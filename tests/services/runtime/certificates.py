"""Certificates for tests, made by the openssl program."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    cert_file: Path
    key_file: Path


def make_authority(folder: Path, name: str) -> Identity:
    return _make(folder, name, "-addext", "basicConstraints=critical,CA:TRUE")


def make_identity(
    folder: Path,
    name: str,
    authority: Identity,
    extension: str = "subjectAltName=DNS:localhost,IP:127.0.0.1",
) -> Identity:
    return _make(
        folder, name, "-CA", str(authority.cert_file), "-CAkey", str(authority.key_file),
        "-addext", extension, "-addext", "basicConstraints=CA:FALSE",
    )  # fmt: skip


def _make(folder: Path, name: str, *options: str) -> Identity:
    identity = Identity(cert_file=folder / f"{name}.pem", key_file=folder / f"{name}.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", f"/CN={name}", "-keyout", str(identity.key_file),
         "-out", str(identity.cert_file), *options],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return identity
