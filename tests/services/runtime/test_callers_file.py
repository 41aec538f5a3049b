"""The file of callers: what is read, and what is refused."""

from pathlib import Path

import pytest

from services.errors import InvalidInputError
from services.runtime.callers_file import read_callers
from services.runtime.quotas import Quota
from services.runtime.tokens import check_token, new_token, read_token, token_digest

DIGEST = "sha256:" + "0" * 64


def write(folder: Path, text: str) -> Path:
    path = folder / "callers.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_caller_has_roles_tokens_identities_and_a_quota(tmp_path: Path) -> None:
    text = f"""
        [callers."render-farm.1"]
        roles = ["batch", "observer"]
        tokens = ["{DIGEST}", "{token_digest("other")}"]
        identities = ["spiffe://example.org/farm", "farm.example"]
        calls_per_minute = 60
        work_per_minute = 1_000.5

        [callers.plain]
        """
    callers = read_callers(write(tmp_path, text))
    found = callers.by_token(DIGEST)
    assert found is not None
    assert found is callers.by_token(token_digest("other"))
    assert found is callers.by_identities(("unknown", "farm.example"))
    assert found.usage.name == "render-farm.1"
    assert found.usage.quota == Quota(calls_per_minute=60, work_per_minute=1000.5)
    assert found.roles == {"batch", "observer"}
    assert callers.by_identities(()) is None
    assert len(callers) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[callers.a]\nroles = [caller]", "which is not TOML: .*line 2"),
        ("callers = 3", "callers is '3'"),
        ("[caller.a]", "caller is not known; known are roles, tokens"),
        ("[callers.a]\nrole = ['caller']", "callers.a.role is not known"),
        ("[callers.a]\nroles = ['root']", r"callers.a.roles\[0\] is 'root'"),
        ("[callers.a]\nroles = []", "callers.a.roles is"),
        ("[callers.'a b']", "callers.'a b' is no name"),
        ("[callers.'ipv4:10.0.0.1']", "is no name"),
        (f"[callers.'{'a' * 65}']", "is no name"),
        ("[callers.a]\ncalls_per_minute = 0", "calls_per_minute is '0'"),
        ("[callers.a]\nwork_per_minute = inf", "work_per_minute is 'inf'"),
        ("[callers.a]\nwork_per_minute = nan", "work_per_minute is 'nan'"),
        (f"[callers.a]\ntokens = ['{DIGEST}']\n[callers.b]\ntokens = ['{DIGEST}']", "b.tokens has one that"),
        (f"[callers.a]\ntokens = ['{DIGEST}', '{DIGEST}']", "a.tokens has one that callers.a has too"),
        ("[callers.a]\nidentities = ['x']\n[callers.b]\nidentities = ['x']", "b.identities has one that"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason) as caught:
        read_callers(write(tmp_path, text))
    assert str(tmp_path) in str(caught.value)
    assert caught.value.violations[0].field == "callers_file"


@pytest.mark.parametrize("tokens", ["'{}'", "['{}']", "['sha256:{}']", f"['{DIGEST}', '{{}}']"])
def test_a_token_written_into_the_file_is_not_repeated_in_the_error(tmp_path: Path, tokens: str) -> None:
    secret = new_token()
    with pytest.raises(InvalidInputError, match="never a token itself") as caught:
        read_callers(write(tmp_path, f"[callers.a]\ntokens = {tokens.format(secret)}"))
    assert secret not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InvalidInputError, match="can't be read"):
            read_callers(path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="not text in UTF-8"):
        read_callers(binary)


def test_tokens_are_long_random_and_safe_in_headers() -> None:
    tokens = {new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    for token in tokens:
        assert check_token("token", f" {token}\n") == token
        assert token.startswith("milonga_")
        assert len(token) >= 51


@pytest.mark.parametrize("content", [b"", b" \n", b"a b", b"a\nb", "tök".encode(), b"\xff", b"a\x00b"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="token_file"):
        read_token("token_file", path)
