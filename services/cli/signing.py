"""Options that sign or mark the clips of a command."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.making import GeneratedClips
from services.cli.scorers import refuse

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner

_PANEL = "Provenance"


@dataclass(frozen=True, kw_only=True, slots=True)
class SigningOptions:
    """The options of a signature, and of a watermark."""

    sign_cert: Annotated[
        Path | None,
        typer.Option(
            help="Certificate chain (PEM): sign clips, and state in them what made them (C2PA).",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    sign_key: Annotated[
        Path | None,
        typer.Option(help="Its private key (PEM).", show_default=False, rich_help_panel=_PANEL),
    ] = None
    sign_prompt: Annotated[
        bool,
        typer.Option(
            "--sign-prompt", help="State the prompt itself, not only its hash.", rich_help_panel=_PANEL
        ),
    ] = False

    sign_registry: Annotated[
        str | None,
        typer.Option(
            help="MLflow server: also state the runs that made and promoted the model.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    watermark: Annotated[
        Path | None,
        typer.Option(
            help="AudioSeal's generator_base.pth: mark clips that are made in this process with the "
            "first bits of the model's digest.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    def open(self) -> "ClipSigner | None":
        """Return the signer; None without options. Raises `InvalidInputError`."""
        if self.sign_cert is None or self.sign_key is None:
            if self.sign_cert or self.sign_key or self.sign_prompt or self.sign_registry:
                refuse("--sign-cert, --sign-key", "need each other; give both, or neither")
            return None
        from services.provenance.signing import ClipSigner

        runs_of = None
        if self.sign_registry is not None:
            from services.weights.lineage import Lineage

            runs_of = Lineage(self.sign_registry)
        return ClipSigner(
            self.sign_cert,
            self.sign_key,
            names=("--sign-cert", "--sign-key"),
            with_prompt=self.sign_prompt,
            runs_of=runs_of,
        )


def signed(made: GeneratedClips, prompt: str, signer: "ClipSigner | None") -> GeneratedClips:
    """Return the clips of a prompt with manifests; unchanged without a signer."""
    if signer is None:
        return made
    from services.provenance.signing import Origin

    model = made.generation.model
    clips = tuple(
        replace(
            clip,
            audio=signer.sign(
                clip.audio,
                clip.encoding,
                Origin(prompt=prompt, model=model, seed=clip.seed, clip_index=clip.index),
            ),
        )
        for clip in made.clips
    )
    return replace(made, clips=clips)
