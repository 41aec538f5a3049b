"""`milonga verify`: who made clips, and whether they were changed since."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.making import to_json
from services.errors import FieldViolation, InvalidInputError, invalid

if TYPE_CHECKING:
    from services.models.watermark import Detection, WatermarkDetector


def verify(
    clips: Annotated[
        list[Path], typer.Argument(help="Audio files (WAV, FLAC, MP3).", show_default=False, metavar="CLIP")
    ],
    trust: Annotated[
        Path | None,
        typer.Option(
            help="Certificates (PEM) of authorities. Clips signed by others are refused.", show_default=False
        ),
    ] = None,
    watermark: Annotated[
        Path | None,
        typer.Option(
            help="AudioSeal's detector_base.pth: look for a watermark too. A marked clip needs no manifest.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per clip.")] = False,
) -> None:
    """Verify the C2PA manifests of clips; print what made each.

    Exit code 2 if a clip has no manifest (nor, with --watermark, a watermark), was changed after it was
    signed, or is not signed by an authority of --trust.
    """
    detector = None
    if watermark is not None:
        from services.models.watermark.audioseal import AudioSealDetector

        detector = AudioSealDetector(watermark)
    authorities = None
    if trust is not None:
        from services.provenance.reading import read_authorities

        authorities = read_authorities(trust, "--trust")
    faults: list[FieldViolation] = []
    for path in clips:
        try:
            faults += _verify(path, authorities, detector, as_json=as_json)
        except InvalidInputError as error:
            faults += error.violations
    if faults:
        raise InvalidInputError(*faults)


def _verify(
    path: Path, authorities: str | None, detector: "WatermarkDetector | None", *, as_json: bool
) -> list[FieldViolation]:
    """Print what the manifest of a clip says; return what is wrong with it."""
    from services.provenance.reading import read_provenance

    name = str(path)
    content = _read(path, name)
    found = read_provenance(content, authorities=authorities, field=name)
    mark = None if detector is None else _detect(content, name, detector)
    if as_json:
        record = {} if mark is None else {"watermark": {**asdict(mark), "marked": mark.marked}}
        typer.echo(to_json({"clip": name, "manifest": None if found is None else found.record(), **record}))
    elif mark is not None:
        said = f"model digest {mark.message:04x}…" if mark.marked else "none"
        typer.echo(f"{name}: watermark: {said} ({mark.share:.0%} of the samples)")
    if found is None and mark is not None and mark.marked:
        return []
    if found is None:
        return [FieldViolation(name, "has no manifest: nothing says who made it")]
    if not as_json:
        typer.echo(f"{name}: {found.state}, signed by {found.signer or 'an unnamed certificate'}")
        made = "a trained model" if found.ai_generated else "not stated to be made by a model"
        model = found.generation.get("model", {})
        details = {
            "made by": f"{model['name']} {model['version']} {model['digest']}" if model else made,
            **found.generation.get("registry", {}),
            "time": found.generation.get("time"),
            "seed": found.generation.get("seed"),
            "prompt": found.generation.get("prompt"),
            "prompt's SHA-256": found.generation.get("prompt_sha256"),
        }
        for label, value in details.items():
            if value:
                typer.echo(f"  {label}: {value}")
    if found.state == "invalid":
        return [
            FieldViolation(name, f"is not what was signed: {'; '.join(found.faults) or 'invalid manifest'}")
        ]
    if authorities is not None and found.state != "trusted":
        return [
            FieldViolation(name, f"is signed by {found.signer!r}, whom no authority of --trust has certified")
        ]
    return []


def _detect(content: bytes, name: str, detector: "WatermarkDetector") -> "Detection":
    from services.audio.decoding import AudioBounds, decode

    clip = decode(content, name, AudioBounds())
    return detector.detect(clip.waveform, clip.sampling_rate)


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise invalid(field, f"is {path}, which can't be read: {error.strerror or error}") from error
