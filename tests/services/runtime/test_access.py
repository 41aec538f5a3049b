"""Who may call: tokens, certificates, roles, quotas, on a real server."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from services.catalogue import CATALOGUE
from services.errors import InvalidInputError
from services.runtime import access, guesses
from services.runtime.callers import Caller, Priority
from services.runtime.roles import OPEN, ROLES
from services.runtime.settings import ServerSettings, load_settings
from services.runtime.tokens import new_token, token_digest
from tests.services.runtime.answering import GENERATE, GET_MODEL, SWITCH, UNLISTED, answering
from tests.services.runtime.certificates import make_authority, make_identity

OK = grpc.StatusCode.OK
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

TOKENS = {name: new_token() for name in ("studio", "studio-2", "night", "watch", "root", "both")}


def table(name: str, *tokens: str, **values: object) -> str:
    """Return a caller's table."""
    lines = [f"{key} = {value}" for key, value in values.items()]
    digests = ", ".join(f'"{token_digest(token)}"' for token in tokens)
    return "\n".join([f"[callers.{name}]", f"tokens = [{digests}]", *lines, ""])


@pytest.fixture
def callers_file(tmp_path: Path) -> Path:
    path = tmp_path / "callers.toml"
    path.write_text(
        table("studio", TOKENS["studio"], TOKENS["studio-2"])
        + table("night", TOKENS["night"], roles='["batch"]')
        + table("watch", TOKENS["watch"], roles='["observer"]')
        + table("root", TOKENS["root"], roles='["operator"]')
        + table("both", TOKENS["both"], roles='["batch", "caller"]')
    )
    return path


def replace(path: Path, text: str) -> None:
    """Write a file as editors and Kubernetes do: under another name, which then takes its place."""
    other = path.with_name("new.toml")
    other.write_text(text)
    os.replace(other, path)


@pytest.mark.parametrize(
    ("token", "method", "code"),
    [
        ("studio", GENERATE, OK),
        ("studio-2", GENERATE, OK),
        ("studio", GET_MODEL, OK),
        ("studio", SWITCH, DENIED),
        ("night", GENERATE, OK),
        ("watch", GENERATE, DENIED),
        ("watch", GET_MODEL, OK),
        ("watch", SWITCH, DENIED),
        ("root", GENERATE, DENIED),
        ("root", GET_MODEL, OK),
        ("root", SWITCH, OK),
        ("root", UNLISTED, DENIED),
        ("both", UNLISTED, DENIED),
        (None, GENERATE, UNAUTHENTICATED),
        (None, GET_MODEL, UNAUTHENTICATED),
        (None, SWITCH, UNAUTHENTICATED),
    ],
)
async def test_roles_decide_about_methods(
    callers_file: Path, token: str | None, method: str, code: grpc.StatusCode
) -> None:
    async with answering(callers_file=callers_file) as service:
        assert await service.code(method, TOKENS[token] if token else None) is code
        assert len(service.callers) == (code is OK)
        await service.count(method, code.name)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer x{}", "Bearer {0} {0}"],
)
async def test_other_headers_are_refused(callers_file: Path, header: str) -> None:
    async with answering(callers_file=callers_file) as service:
        assert await service.code(authorization=header.format(TOKENS["studio"])) is UNAUTHENTICATED
        assert not service.callers


@pytest.mark.parametrize("header", ["Bearer {}", "bearer {}", "BEARER   {}  "])
async def test_the_scheme_is_written_as_people_write_it(callers_file: Path, header: str) -> None:
    async with answering(callers_file=callers_file) as service:
        assert await service.code(authorization=header.format(TOKENS["studio"])) is OK


@pytest.mark.parametrize(
    ("token", "asked", "priority"),
    [
        ("studio", None, "interactive"),
        ("studio", "batch", "batch"),
        ("night", None, "batch"),
        ("night", "interactive", "batch"),
        ("both", None, "interactive"),
        ("both", "batch", "batch"),
    ],
)
async def test_a_caller_has_name_peer_and_priority(
    callers_file: Path, token: str, asked: str | None, priority: Priority
) -> None:
    async with answering(callers_file=callers_file) as service:
        asking: dict[str, Any] = {"x_milonga_priority": asked} if asked else {}
        await service.call(token=TOKENS[token], **asking)
    (caller,) = service.callers
    assert (caller.name, caller.key, caller.peer) == (token, token, "ipv4:127.0.0.1")
    assert caller.priority == priority


async def test_an_unknown_priority_is_refused() -> None:
    async with answering() as service:
        with pytest.raises(grpc.aio.AioRpcError, match="is 'urgent', must be interactive or batch") as caught:
            await service.call(x_milonga_priority="urgent")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_without_a_file_anybody_here_may_call_and_a_gateways_token_is_ignored() -> None:
    async with answering() as service:
        assert [await service.code(), await service.code(token="of-a-gateway")] == [OK, OK]
        assert await service.code(SWITCH) is grpc.StatusCode.UNIMPLEMENTED
        assert await service.code(UNLISTED) is DENIED
    assert service.callers == [Caller(peer="ipv4:127.0.0.1")] * 2


async def test_a_unix_socket_is_local(tmp_path: Path) -> None:
    async with answering(listen=f"unix:{tmp_path}/socket") as service:
        assert await service.code() is OK
    assert service.callers == [Caller(peer="unix")]


async def test_the_operators_token_switches_and_calls_as_anybody() -> None:
    async with answering(operator_token="of-the-operator") as service:
        assert await service.code(SWITCH, "of-the-operator") is OK
        assert await service.code(GENERATE, "of-the-operator") is OK
        assert await service.code(SWITCH, "guessed") is UNAUTHENTICATED
        assert await service.code(SWITCH) is UNAUTHENTICATED
        assert await service.code(GENERATE, "of-a-gateway") is OK


async def test_a_token_that_is_the_operators_and_a_callers_has_the_roles_of_both(callers_file: Path) -> None:
    async with answering(callers_file=callers_file, operator_token=TOKENS["studio"]) as service:
        assert await service.code(SWITCH, TOKENS["studio"]) is OK
        assert await service.code(GENERATE, TOKENS["studio"]) is OK
    assert {caller.name for caller in service.callers} == {"studio"}


async def test_anonymous_callers_next_to_known_ones_where_a_setting_allows_it(callers_file: Path) -> None:
    async with answering(callers_file=callers_file, anonymous="allowed") as service:
        assert [await service.code(), await service.code(token=TOKENS["studio"])] == [OK, OK]
        assert await service.code(token="wrong") is UNAUTHENTICATED
        assert await service.code(SWITCH) is UNAUTHENTICATED


async def test_anonymous_callers_are_refused_where_a_setting_says_so() -> None:
    async with answering(anonymous="refused") as service:
        assert await service.code() is UNAUTHENTICATED


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.7:0", "host.example:0"])
def test_an_address_that_others_reach_needs_names_or_a_setting(listen: str, callers_file: Path) -> None:
    def allowed(**values: Any) -> bool:
        return access.allows_anonymous(load_settings(ServerSettings, listen=listen, **values))

    with pytest.raises(InvalidInputError, match="any of them could call; give --callers-file"):
        allowed()
    assert allowed(anonymous="allowed")
    assert not allowed(anonymous="refused")
    assert not allowed(callers_file=callers_file)
    files = {"tls_cert_file": "a", "tls_key_file": "b"}
    with pytest.raises(InvalidInputError, match="any of them could call"):
        allowed(**files)
    assert not allowed(**files, tls_client_ca_file="c")


async def test_a_token_is_rotated_without_a_restart(
    callers_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "POLL_SECONDS", 0.0)
    old, new = TOKENS["studio"], new_token()
    async with answering(callers_file=callers_file) as service:
        for tokens, codes in (
            ((old,), [OK, UNAUTHENTICATED]),
            ((old, new), [OK, OK]),
            ((new,), [UNAUTHENTICATED, OK]),
        ):
            replace(callers_file, table("studio", *tokens))
            assert [await service.code(token=token) for token in (old, new)] == codes
        callers_file.write_text("")  # in place
        assert await service.code(token=new) is UNAUTHENTICATED


@pytest.mark.parametrize("text", ["[callers", "[callers.a]\ntokens = ['plain']", None])
async def test_a_broken_file_changes_nothing(
    callers_file: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setattr(access, "POLL_SECONDS", 0.0)
    async with answering(callers_file=callers_file) as service:
        if text is None:
            callers_file.unlink()
        else:
            replace(callers_file, text)
        assert await service.code(token=TOKENS["studio"]) is OK
        service.server.access.reload()
        assert await service.code(token=TOKENS["studio"]) is OK
        replace(callers_file, table("studio", TOKENS["studio-2"]))
        service.server.access.reload()
        assert await service.code(token=TOKENS["studio"]) is UNAUTHENTICATED


async def test_calls_are_limited_by_caller_and_the_refusal_says_when_to_try_again(callers_file: Path) -> None:
    callers_file.write_text(
        table("studio", TOKENS["studio"], calls_per_minute=3) + table("night", TOKENS["night"])
    )
    async with answering(callers_file=callers_file) as service:
        codes = [await service.code(token=TOKENS["studio"]) for _ in range(5)]
        assert codes == [OK, OK, OK, EXHAUSTED, EXHAUSTED]
        assert await service.code(token=TOKENS["night"]) is OK
        with pytest.raises(grpc.aio.AioRpcError, match="'studio' has used up its quota of 3 calls") as caught:
            await service.call(token=TOKENS["studio"])
    details = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
    assert b"google.rpc.RetryInfo" in bytes(details)
    assert b"QuotaExceededError" in bytes(details)


async def test_a_reload_does_not_refill_quotas(callers_file: Path) -> None:
    def write(rate: int) -> None:
        callers_file.write_text(table("studio", TOKENS["studio"], calls_per_minute=rate))

    write(1)
    async with answering(callers_file=callers_file) as service:
        assert await service.code(token=TOKENS["studio"]) is OK
        service.server.access.reload()
        assert await service.code(token=TOKENS["studio"]) is EXHAUSTED
        write(2)
        service.server.access.reload()
        assert await service.code(token=TOKENS["studio"]) is OK


async def test_guesses_back_off_but_not_for_a_neighbour_with_a_token_that_was_right(
    callers_file: Path,
) -> None:
    async with answering(callers_file=callers_file) as service:
        assert await service.code(token=TOKENS["studio"]) is OK
        wrong = [await service.code(token=f"guess-{number}") for number in range(guesses.FREE + 3)]
        assert wrong == [UNAUTHENTICATED] * guesses.FREE + [EXHAUSTED] * 3
        assert await service.code(token=TOKENS["studio"]) is OK
        # Not compared at all, so that a right guess is not noticed.
        assert await service.code(token=TOKENS["night"]) is EXHAUSTED
        assert await service.code() is UNAUTHENTICATED


@pytest.mark.parametrize(
    ("extension", "identities", "expected"),
    [
        ("subjectAltName=DNS:studio.example,DNS:other.example", ["other.example"], "studio"),
        ("subjectAltName=URI:spiffe://example.org/studio", ["spiffe://example.org/studio"], "studio"),
        ("keyUsage=digitalSignature", ["holder"], "studio"),
        ("subjectAltName=DNS:studio.example", ["holder"], None),  # the common name counts without others only
        ("subjectAltName=DNS:studio.example", ["stranger.example"], None),
    ],
)
async def test_a_certificate_names_a_caller(
    tmp_path: Path, extension: str, identities: Iterable[str], expected: str | None
) -> None:
    authority = make_authority(tmp_path, "authority")
    server = make_identity(tmp_path, "server", authority)
    holder = make_identity(tmp_path, "holder", authority, extension)
    path = tmp_path / "callers.toml"
    path.write_text(f"[callers.studio]\nidentities = {list(identities)}\nroles = ['batch']")
    credentials = grpc.ssl_channel_credentials(
        authority.cert_file.read_bytes(), holder.key_file.read_bytes(), holder.cert_file.read_bytes()
    )
    tls: dict[str, Any] = {
        "tls_cert_file": server.cert_file,
        "tls_key_file": server.key_file,
        "tls_client_ca_file": authority.cert_file,
    }
    async with answering(callers_file=path, credentials=credentials, **tls) as service:
        assert await service.code() is (OK if expected else UNAUTHENTICATED)
        assert await service.code(token="wrong") is UNAUTHENTICATED
    assert [(caller.name, caller.priority) for caller in service.callers] == [("studio", "batch")] * bool(
        expected
    )
    async with answering(credentials=credentials, **tls) as service:
        assert await service.code() is OK
    (caller,) = service.callers
    assert caller.name
    assert caller.roles == {"caller"}


def test_every_rpc_of_every_service_is_in_the_table() -> None:
    from google.protobuf import descriptor_pool
    from tritonclient.grpc import service_pb2  # noqa: F401  # registers its file

    from milonga.v1 import (  # noqa: F401
        captioning_pb2,
        explanation_pb2,
        generation_pb2,
        operator_pb2,
        reward_pb2,
        scoring_pb2,
    )

    names = [entry.rpc for entry in CATALOGUE.values()]
    names += ["milonga.v1.OperatorService", "inference.GRPCInferenceService"]
    pool = descriptor_pool.Default()
    methods = {f"/{name}/{method.name}" for name in names for method in pool.FindServiceByName(name).methods}
    assert methods == ROLES.keys() | OPEN
    assert not ROLES.keys() & OPEN
