"""`milonga generate --check`: describe a clip again, and say in words how that differs from its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from services.api.captioning import ClipCaptioner
from services.api.generation import Clip
from services.api.reading import EVENTS, Comparison, EventReader, compare
from services.catalogue import EMBEDDED_CAPTIONER, captioner_uri
from services.cli.options import URI_FORMS
from services.cli.scorers import naming_option, refuse

PANEL = "Check"
"""Panel of these options in the help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOptions:
    """The options of the check."""

    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Describe each clip by a captioner, and say what of the prompt is missing in it.",
            rich_help_panel=PANEL,
        ),
    ] = False
    captioner: Annotated[
        str | None,
        typer.Option(
            help=f"Captioner in this process: {EMBEDDED_CAPTIONER}, {URI_FORMS}.",
            metavar="URI",
            show_default=EMBEDDED_CAPTIONER,
            rich_help_panel=PANEL,
        ),
    ] = None

    def open(self, device: str | None) -> "Checker | None":
        """Load the captioner; return None if clips are not checked. Raises `MilongaError`."""
        if not self.check:
            if self.captioner is not None:
                refuse("--captioner", "describes clips for --check; give --check as well")
            return None
        from services.api.reading import read_events
        from services.local_captioner import open_captioner
        from services.weights.uri import resolve

        with naming_option("--captioner"):
            model = resolve(captioner_uri(self.captioner or EMBEDDED_CAPTIONER))
            return Checker(open_captioner(model, device=device or "auto"), read_events(model.folder))


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A caption of a clip, compared with the clip's prompt."""

    caption: str
    """Empty for a clip without sound."""
    comparison: Comparison | None
    """The caption, compared with the prompt; None if they can't be compared."""
    unread: str = ""
    """Why they can't."""

    def line(self) -> str:
        """Return the result in words."""
        caption = self.caption or "none, there is no sound in the clip"
        if self.comparison is None:
            return f"caption: {caption} (not compared: {self.unread})"
        differences = self.comparison.in_words() or ("everything that the prompt names, and nothing else",)
        return f"caption: {caption}; {'; '.join(differences)}"

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        if self.comparison is None:
            return {"caption": self.caption, "not_compared": self.unread}
        found = self.comparison
        return {
            "caption": self.caption,
            "missing": list(found.missing),
            "added": list(found.added),
            "in_order": found.in_order,
        }


class Checker:
    """Describes clips and compares what it says with their prompt."""

    def __init__(self, captioner: ClipCaptioner, reader: EventReader | None) -> None:
        self._captioner, self._reader = captioner, reader

    def check(self, prompt: str, clips: Sequence[Clip]) -> list[Check]:
        """Check clips of one prompt. Raises as `ClipCaptioner`."""
        from services.local_captioner import describe

        captions = describe(self._captioner, [(clip.waveform(), clip.sampling_rate) for clip in clips])
        if self._reader is None:
            unread = f"this captioner has no {EVENTS}, which says what its words mean"
            return [Check(caption=caption, comparison=None, unread=unread) for caption in captions]
        wanted = self._reader.read(prompt)
        if wanted.unread or not wanted.events:
            unread = f"the captioner has no words for {wanted.unread or 'this prompt'!r}"
            return [Check(caption=caption, comparison=None, unread=unread) for caption in captions]
        return [
            Check(caption=caption, comparison=compare(wanted, self._reader.read(caption)))
            for caption in captions
        ]

    def close(self) -> None:
        """Free the captioner."""
        self._captioner.close()
