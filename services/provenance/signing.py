"""Sign clips: C2PA's action ``created`` by a trained model, and what made the clip."""

import hashlib
import importlib.metadata
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from services.api.model import ModelVersion
from services.errors import MilongaError, invalid
from services.provenance import GENERATION_LABEL, require_library

_MIME: Final = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}
_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's name of media that a trained model has made."""
_CURVES: Final = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What made a clip."""

    prompt: str
    model: ModelVersion
    seed: int
    clip_index: int = 0


class ClipSigner:
    """Signs clips with one certificate. Thread-safe."""

    def __init__(
        self,
        cert_file: Path,
        key_file: Path,
        *,
        names: Sequence[str] = ("sign_cert", "sign_key"),
        with_prompt: bool = False,
        runs_of: Callable[[ModelVersion], Mapping[str, str]] | None = None,
    ) -> None:
        """Read and check the certificate and its key.

        Args:
            cert_file: certificate chain (PEM), the signer's first.
            key_file: its private key (PEM, PKCS 8, without a password).
            names: names of both in error messages.
            with_prompt: state the prompt itself, not only its hash.
            runs_of: returns the runs of a registry that made and promoted a model, to be stated.

        Raises:
            InvalidInputError: a file can't be read, is none, or both don't belong together.
            UnsupportedError: the library is not installed.
        """
        require_library()
        self._chain, self._key = _read(names[0], cert_file), _read(names[1], key_file)
        self._with_prompt, self._runs_of = with_prompt, runs_of
        try:
            self.certificate = x509.load_pem_x509_certificates(self._chain)[0]
        except ValueError as error:
            raise invalid(names[0], f"is {cert_file}, which holds no certificate in PEM: {error}") from error
        try:
            key = load_pem_private_key(self._key, password=None)
        except (ValueError, TypeError) as error:
            raise invalid(names[1], f"is {key_file}, which holds no usable private key: {error}") from error
        if _public(key.public_key()) != _public(self.certificate.public_key()):
            raise invalid(
                names[1], f"is {key_file}, which is not the key of the first certificate in {cert_file}"
            )
        self.algorithm = _algorithm(names[1], key)
        self.sign(_silence(), "wav", Origin(prompt="", model=_NOTHING, seed=0), names[0])

    @property
    def name(self) -> str:
        """Common name of the certificate."""
        found = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(found[0].value) if found else self.certificate.subject.rfc4514_string()

    def sign(self, audio: bytes, encoding: str, origin: Origin, field: str = "sign_cert") -> bytes:
        """Return the file with a manifest, which changes no sample. Takes milliseconds.

        Raises:
            InvalidInputError: C2PA does not take the certificate, for example because it has expired.
        """
        import c2pa

        info = c2pa.C2paSignerInfo(self.algorithm.encode(), self._chain, self._key, None)
        signed = io.BytesIO()
        try:
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(self._manifest(origin)) as builder:
                builder.sign(signer, _MIME[encoding], io.BytesIO(audio), signed)
        except c2pa.C2paError as error:
            if audio == _silence():
                raise invalid(
                    field, f"can't sign: {_told(error)}; C2PA asks for a chain of at least two"
                ) from error
            raise MilongaError(f"the clip can't be signed: {_told(error)}") from error
        return signed.getvalue()

    def _manifest(self, origin: Origin) -> dict[str, Any]:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        statement: dict[str, Any] = {
            "model": asdict(origin.model),
            # As text: JSON's numbers hold 53 bits.
            "seed": str(origin.seed),
            "clip_index": origin.clip_index,
            "time": time,
            "prompt_sha256": hashlib.sha256(origin.prompt.encode()).hexdigest(),
        }
        if self._with_prompt:
            statement["prompt"] = origin.prompt
        if (
            self._runs_of is not None
            and origin.model is not _NOTHING
            and (runs := self._runs_of(origin.model))
        ):
            statement["registry"] = dict(runs)
        agent = {"name": origin.model.name, "version": origin.model.version}
        action = {
            "action": "c2pa.created", "digitalSourceType": _SOURCE_TYPE, "softwareAgent": agent, "when": time,
        }  # fmt: skip
        return {
            "claim_generator_info": [{"name": "milonga", "version": importlib.metadata.version("milonga")}],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": GENERATION_LABEL, "data": statement},
            ],
        }


_NOTHING: Final = ModelVersion(name="none", version="0", digest="", license="unknown")


def _silence() -> bytes:
    """Return a WAV file, to sign it on trial."""
    import numpy as np

    from services.audio.encoding import encode_audio

    return encode_audio(np.zeros(16, np.float32), 16_000)


def _algorithm(field: str, key: object) -> str:
    match key:
        case ec.EllipticCurvePrivateKey() if key.curve.name in _CURVES:
            return _CURVES[key.curve.name]
        case rsa.RSAPrivateKey():
            return "ps256"
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
    raise invalid(
        field, "is of a kind that C2PA does not take; give an EC key (P-256, P-384, P-521), RSA or Ed25519"
    )


def _public(key: Any) -> bytes:
    found: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return found


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise invalid(field, f"is {path}, which can't be read: {error.strerror or error}") from error


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
