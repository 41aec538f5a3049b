"""Who signs clips here, and whether a clip was changed since it was signed."""

import asyncio
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding
from fastapi import APIRouter, Request

from services.errors import invalid
from services.provenance import SIGNABLE
from services.provenance.reading import read_authorities, read_provenance
from services.web.problems import check_query

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner
    from services.web.settings import WebSettings

_FILE = {
    "requestBody": {
        "required": True,
        "content": {"audio/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def router(settings: "WebSettings", signer: "ClipSigner | None") -> APIRouter:
    """Return the endpoints of provenance."""
    routes = APIRouter()
    trusted = settings.trusted_signers
    authorities = None if trusted is None else read_authorities(trusted, "trusted_signers")

    @routes.get("/v1/provenance")
    async def signs() -> dict[str, Any]:
        """Say who signs the clips that are made here."""
        if signer is None:
            return {"signs": False}
        return {
            "signs": True,
            "signer": signer.name,
            "algorithm": signer.algorithm,
            "formats": list(SIGNABLE),
            "not_after": signer.certificate.not_valid_after_utc.isoformat(),
            "certificate": signer.certificate.public_bytes(Encoding.PEM).decode(),
        }

    @routes.post("/v1/provenance", openapi_extra=_FILE)
    async def verify(request: Request) -> dict[str, Any]:
        """Verify the manifest of a clip, whose file is the body: WAV, FLAC or MP3."""
        check_query(request)
        content = await request.body()
        if not content:
            raise invalid("body", "is empty; send a WAV, FLAC or MP3 file")
        found = await asyncio.to_thread(read_provenance, content, authorities=authorities, field="body")
        return {"manifest": None if found is None else found.record()}

    return routes
