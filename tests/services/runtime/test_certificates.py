"""Certificates that change while a service runs."""

import asyncio
import logging
import shutil
import signal
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from services.runtime import certificates
from services.runtime.certificates import Certificates
from services.runtime.metrics import ServerMetrics
from services.runtime.settings import ServerSettings, load_settings
from tests.services.runtime.certificates import Identity, make_authority, make_identity
from tests.services.runtime.programs import error_of, program, score, watch_health
from tests.waiting import LIMIT

EXPIRY = "milonga_tls_certificate_expiry_timestamp_seconds"
PROMPT = "a dog barks"


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Let every level be captured, whatever other tests have configured."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    yield
    structlog.configure(**before)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("tls")
    authority, other = make_authority(folder, "authority"), make_authority(folder, "other")
    return {
        "authority": authority,
        "other": other,
        "first": make_identity(folder, "first", authority),
        "second": make_identity(folder, "second", authority),
        "client": make_identity(folder, "client", authority),
        "newcomer": make_identity(folder, "newcomer", other),
    }


@pytest.fixture
def files(identities: dict[str, Identity], tmp_path: Path) -> dict[str, Path]:
    """The files of a service's settings, with the first identity."""
    paths = {name: tmp_path / name for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file")}
    shutil.copy(identities["authority"].cert_file, paths["tls_client_ca_file"])
    _replace(paths, identities["first"])
    return paths


def _replace(files: dict[str, Path], identity: Identity) -> None:
    shutil.copy(identity.cert_file, files["tls_cert_file"])
    shutil.copy(identity.key_file, files["tls_key_file"])


def _credentials(identities: dict[str, Identity], client: str) -> grpc.ChannelCredentials:
    identity = identities[client]
    return grpc.ssl_channel_credentials(
        identities["authority"].cert_file.read_bytes(),
        identity.key_file.read_bytes(),
        identity.cert_file.read_bytes(),
    )


def _served(port: int, identities: dict[str, Identity]) -> dict[str, Any]:
    """The certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=identities["authority"].cert_file)
    context.load_cert_chain(identities["client"].cert_file, identities["client"].key_file)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as secure,
    ):
        certificate: Any = secure.getpeercert()
    name = certificate["subject"][0][0][1]
    return {"name": name, "expiry": ssl.cert_time_to_seconds(certificate["notAfter"])}


def _metric(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(EXPIRY))


def test_sighup_changes_certificates_and_authorities_and_drops_no_connection(
    identities: dict[str, Identity], files: dict[str, Path]
) -> None:
    settings = {f"MILONGA_{name.upper()}": str(path) for name, path in files.items()}
    ours, theirs = _credentials(identities, "client"), _credentials(identities, "newcomer")
    with program(MILONGA_METRICS_PORT="0", **settings) as started, started.channel(ours) as channel:
        port, metrics = started.ready["port"], started.ready["metrics_port"]
        open_call = watch_health(channel).call
        assert _served(port, identities)["name"] == "first"

        _replace(files, identities["second"])
        shutil.copy(identities["other"].cert_file, files["tls_client_ca_file"])
        started.process.send_signal(signal.SIGHUP)
        started.read_until("certificates read")
        with started.channel(theirs) as newcomer:
            assert score(newcomer, PROMPT).result().rewards
        with started.channel(ours) as late:
            assert error_of(score(late, PROMPT))[0] is grpc.StatusCode.UNAVAILABLE
        assert open_call.is_active()
        assert score(channel, PROMPT).result().rewards

        shutil.copy(identities["authority"].cert_file, files["tls_client_ca_file"])
        started.process.send_signal(signal.SIGHUP)
        started.read_until("certificates read")
        second = _served(port, identities)
        assert second["name"] == "second"
        assert _metric(metrics) == second["expiry"]

        files["tls_key_file"].write_bytes(b"nonsense")
        started.process.send_signal(signal.SIGHUP)
        refused = started.read_until("certificates refused, the former ones stay")
        assert str(files["tls_key_file"]) in refused["reason"]
        assert refused["level"] == "error"
        assert _served(port, identities) == second
        assert open_call.is_active()
        started.process.send_signal(signal.SIGTERM)
        assert started.wait()[0] == 0


def _read(files: dict[str, Path], metrics: ServerMetrics | None = None) -> Certificates:
    paths: dict[str, Any] = dict(files)
    return Certificates(load_settings(ServerSettings, **paths), metrics or ServerMetrics())


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_changed_files_are_noticed_and_each_fault_is_logged_once(
    identities: dict[str, Identity], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "POLL_SECONDS", 0.01)
    with capture_logs() as logs:
        found = _read(files)
        watch = asyncio.create_task(found.watch())
        shutil.copy(identities["second"].cert_file, files["tls_cert_file"])  # without its key, at first
        await _until(lambda: any("refused" in line["event"] for line in logs))
        await asyncio.sleep(0.1)
        shutil.copy(identities["second"].key_file, files["tls_key_file"])
        await _until(lambda: any(line["event"] == "certificates changed" for line in logs))
        files["tls_cert_file"].unlink()
        await _until(lambda: "can't be read" in logs[-1].get("reason", ""))
        watch.cancel()
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "certificates refused, the former ones stay"
    ] * 2


def test_a_certificate_that_expires_soon_is_warned_of_once_a_day(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with capture_logs() as logs:
        found = _read(files)  # valid for two days
        found._warn()
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("the certificate expires soon", "warning")
    assert 1.9 < line["expires_in_days"] < 2.1
    with capture_logs() as logs:
        monkeypatch.setattr(certificates, "_WARNING_INTERVAL_SECONDS", 0.0)
        found._warn()
        monkeypatch.setattr(certificates, "WARNING_SECONDS", 86_400.0)
        found._warn()
    assert len(logs) == 1
    monkeypatch.setattr(time, "time", lambda: 2e9)
    with capture_logs() as logs:
        _read(files)
    assert [line["event"] for line in logs] == ["the certificate has expired"]
