"""Read the manifest of a clip, and verify it."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from services.audio.containers import ContainerError, open_container
from services.errors import invalid
from services.provenance import GENERATION_LABEL, require_library

_MIME: Final = {"WAV": "audio/wav", "FLAC": "audio/flac", "MP3": "audio/mpeg"}
_UNTRUSTED: Final = "signingCredential.untrusted"
_FAULTS: Final[Mapping[str, str]] = {
    "assertion.dataHash.mismatch": "the sound was changed after it was signed",
    "assertion.hashedURI.mismatch": "a statement was changed after it was signed",
    "claimSignature.mismatch": "the signature is not that of the claim",
    "claimSignature.outsideValidity": "the certificate was not valid when it signed",
    "signingCredential.invalid": "the certificate may not sign",
    "signingCredential.expired": "the certificate has expired",
    "signingCredential.revoked": "the certificate was revoked",
}
"""What C2PA's codes of failures mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """The manifest of a clip."""

    state: Literal["trusted", "valid", "invalid"]
    """trusted: intact, and signed with a trusted authority's certificate; valid: intact, with any."""
    signer: str
    """Common name of the certificate."""
    generator: str
    """The program that signed, and its version."""
    ai_generated: bool
    """Whether it says that a trained model made the sound."""
    generation: Mapping[str, Any]
    """What made the clip: model, seed, time, hash of the prompt. Empty in other programs' manifests."""
    faults: tuple[str, ...]
    """Why it is invalid, one sentence each."""

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**asdict(self), "generation": dict(self.generation), "faults": list(self.faults)}


def read_authorities(path: Path, field: str) -> str:
    """Return the certificates (PEM) of the authorities in a file.

    Raises:
        InvalidInputError: the file can't be read, or holds no certificate.
        UnsupportedError: the library is not installed.
    """
    require_library()
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise invalid(field, f"is {path}, which can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise invalid(
            field, f"is {path}, which holds no certificate in PEM; give those of authorities"
        ) from error
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in certificates)


def read_provenance(
    audio: bytes, *, authorities: str | None = None, field: str = "clip"
) -> Provenance | None:
    """Return the verified manifest of a file; None if it has none.

    Args:
        audio: a WAV, FLAC or MP3 file.
        authorities: certificates (PEM) of trusted authorities; None: no certificate is trusted.
        field: name of the file in error messages.

    Raises:
        InvalidInputError: the file is of another kind, or damaged.
        UnsupportedError: the library is not installed.
    """
    require_library()
    import c2pa

    try:
        kind, _ = open_container(audio)
    except ContainerError as error:
        raise invalid(field, str(error)) from error
    if kind not in _MIME:
        raise invalid(field, f"is {kind}, which holds no manifest; give WAV, FLAC or MP3")
    context = None
    if authorities is not None:
        trust = {"trust": {"trust_anchors": authorities}, "verify": {"verify_trust": True}}
        context = c2pa.Context(settings=c2pa.Settings.from_dict(trust))
    try:
        with c2pa.Reader(_MIME[kind], io.BytesIO(audio), context=context) as reader:
            return _provenance(json.loads(reader.json()))
    except c2pa.C2paError as error:
        if "ManifestNotFound" in type(error).__name__ or "no JUMBF data found" in str(error):
            return None
        raise invalid(
            field, f"has a manifest that can't be read: {' '.join(str(error).split())[:200]}"
        ) from error


def _provenance(store: Mapping[str, Any]) -> Provenance:
    manifest = store["manifests"][store["active_manifest"]]
    assertions = {one["label"]: one["data"] for one in manifest.get("assertions", ())}
    actions = [
        action
        for label, data in assertions.items()
        if label.startswith("c2pa.actions")
        for action in data.get("actions", ())
    ]
    signature = manifest.get("signature_info", {})
    generator: Mapping[str, Any] = next(iter(manifest.get("claim_generator_info", ())), {})
    codes = [one["code"] for one in store.get("validation_status", ()) if one["code"] != _UNTRUSTED]
    state = str(store.get("validation_state", "Invalid")).lower()
    return Provenance(
        state=state if state in ("trusted", "valid") and not codes else "invalid",  # type: ignore[arg-type]
        signer=signature.get("common_name") or signature.get("issuer") or "",
        generator=f"{generator.get('name', '')} {generator.get('version', '')}".strip(),
        ai_generated=any(
            str(action.get("digitalSourceType", "")).endswith("/trainedAlgorithmicMedia")
            for action in actions
        ),
        generation=assertions.get(GENERATION_LABEL, {}),
        faults=tuple(dict.fromkeys(_FAULTS.get(code, code) for code in codes)),
    )
