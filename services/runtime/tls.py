"""Read and check TLS files, with errors that name the file.

gRPC would only report that a port can't be bound or a service can't be reached. The client uses this module
too, so it imports nothing of the serving extra.
"""

import ssl
from pathlib import Path

from services.errors import FieldViolation, InvalidInputError


def read_authorities(field: str, path: Path) -> bytes:
    """Return the content of the CA certificate file `path`.

    Raises:
        InvalidInputError: the file can't be read, or holds no certificate in PEM; names `field`.
    """
    content = _read(field, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise _refusal(field, path, "has no certificate in PEM") from error
    return content


def read_identity(cert_field: str, cert_path: Path, key_field: str, key_path: Path) -> tuple[bytes, bytes]:
    """Return the contents of the certificate chain `cert_path` and its private key `key_path`.

    Raises:
        InvalidInputError: a file can't be read, or they are not a certificate chain and its unencrypted
            private key in PEM; names the field.
    """
    chain, key = _read(cert_field, cert_path), _read(key_field, key_path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert_path, key_path, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise _refusal(
            key_field, key_path, f"is not the private key of {cert_path}, both in PEM and without a password"
        ) from error
    return chain, key


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refusal(field, path, f"can't be read: {error.strerror}") from error


def _refusal(field: str, path: Path, fault: str) -> InvalidInputError:
    return InvalidInputError(FieldViolation(field, f"is {path}, which {fault}"))
