"""Fields and buttons that several tabs have."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import gradio as gr

from services.web.studio.messages import note

Updates = AsyncIterator[tuple[Any, Any]]
"""What the page shows while a call runs: progress and messages, and what came of it."""
Handler = Callable[..., Updates]

QUIET: Final[dict[str, Any]] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of an event that is one short request."""


def short_text(label: str, default: str = "") -> Any:
    """Create a field of a line; `default` is what an empty one means."""
    return gr.Textbox(label=label, placeholder=default, max_lines=1, min_width=90)


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingFields:
    """Fields of the settings of a generation. Empty ones take the model's defaults."""

    negative: Any
    steps: Any
    guidance: Any
    seconds: Any

    @classmethod
    def make(cls, prefix: str = "") -> "SettingFields":
        """Create the fields here; `prefix` distinguishes their labels from another tab's."""
        negative = gr.Textbox(label=f"{prefix}Negative prompt", placeholder="none", max_lines=2)
        with gr.Row():
            return cls(
                negative=negative,
                steps=short_text(f"{prefix}Steps", "default"),
                guidance=short_text(f"{prefix}Guidance", "default"),
                seconds=short_text(f"{prefix}Length (s)", "default"),
            )

    @property
    def all(self) -> list[Any]:
        """The fields, in the order of `services.web.studio.making.Form.of`."""
        return [self.negative, self.steps, self.guidance, self.seconds]


@dataclass(frozen=True, kw_only=True, slots=True)
class Buttons:
    """A button that starts a call, and one that cancels it."""

    start: Any
    cancel: Any

    @classmethod
    def make(cls, text: str) -> "Buttons":
        """Create the buttons here."""
        with gr.Row():
            start = gr.Button(text, variant="primary", min_width=120)
            cancel = gr.Button("Cancel", interactive=False, min_width=120)
        return cls(start=start, cancel=cancel)

    def connect(self, handler: Handler, inputs: list[Any], said: Any, shown: Any, submits: list[Any]) -> None:
        """Run `handler` on the button and on Enter in `submits`; it yields values of both outputs."""

        async def run(*values: Any) -> AsyncIterator[tuple[Any, ...]]:
            busy = gr.update(interactive=False), gr.update(interactive=True)
            async for update in handler(*values):
                yield *busy, *update
            yield *_idle(), gr.skip(), gr.skip()

        started = gr.on(
            [self.start.click, *(one.submit for one in submits)],
            run,
            inputs,
            [self.start, self.cancel, said, shown],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
        # Afterwards: otherwise a last update of the cancelled call can replace this one.
        self.cancel.click(None, cancels=[started], **QUIET).then(
            lambda: (*_idle(), note("Cancelled.")), None, [self.start, self.cancel, said], **QUIET
        )


def _idle() -> tuple[Any, Any]:
    """Return the updates of start and cancel while nothing runs."""
    return gr.update(interactive=True), gr.update(interactive=False)
