"""What a failed download, a clone without its large files, and kin leave is recognised."""

from pathlib import Path

import pytest

from services.files import HEAD, describe_file, describe_path

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (POINTER, "git lfs pull"),
        (b"\xef\xbb\xbf" + POINTER.replace(b"\n", b"\r\n"), "git lfs pull"),
        (b"../../.git/annex/objects/Xw/3q/SHA256E-s12--0a.wav/SHA256E-s12--0a.wav", "git annex get"),
        (b"/annex/objects/SHA256E-s12--0a.wav\n", "git annex get"),
        (b"<!DOCTYPE html>\n<html><head>" + b"x" * 4000, "a web page"),
        (b"\xef\xbb\xbf\r\n  <HTML lang='en'>", "/resolve/"),
        (b'{"error":"Repository not found"}', 'a server\'s reply ({"error":"Repository not found"})'),
        (b"Entry not found", "a server's reply (Entry not found)"),
        (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", "AccessDenied"),
        (bytes.fromhex("0005160700020000") + b"Mac OS X", "without ._"),
        (bytes(5000), "zero bytes"),
    ],
)
def test_what_is_no_file_is_named_with_the_remedy(content: bytes, says: str, tmp_path: Path) -> None:
    found = describe_file(content[:HEAD])
    assert found is not None and says in found and "\n" not in found
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    assert describe_path(path) == found


@pytest.mark.parametrize(
    "content",
    [
        b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(4000),
        b"OggS" + bytes(2000),
        b"fLaC\x00",
        b"PK\x03\x04" + bytes(2000),
        b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
        bytes(20),
    ],
)
def test_other_content_is_not_judged(content: bytes) -> None:
    assert describe_file(content[:HEAD]) is None


def test_what_can_not_be_read_is_not_described(tmp_path: Path) -> None:
    assert describe_path(tmp_path) is None
    assert describe_path(tmp_path / "absent") is None
