"""The tab *Explain*: words × time under the spectrogram, the page of `milonga explain`."""

import asyncio
import html
from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from services.api.explanation import Explanation, ExplanationProgress, ExplanationUpdate
from services.api.generation import Queued
from services.explanation_page import html_page
from services.web.studio.desk import Desk
from services.web.studio.fields import QUIET, Buttons, SettingFields, Updates
from services.web.studio.making import WAITING, Form, follow
from services.web.studio.messages import note, problem, progress, sentences

WITHOUT_SERVICE = "Explanations need a service: start the web door with --explanation HOST:PORT."
_DEFAULT = "the model’s first"


def explain_tab(desk: Desk, token: Any) -> None:
    """Create the tab, or a line that says what it needs."""
    if not desk.settings.explanation:
        gr.HTML(note(WITHOUT_SERVICE))
        return
    with gr.Row():
        prompt = gr.Textbox(label="Prompt to explain", lines=1, max_lines=4, scale=3, min_width=260)
        method = gr.Dropdown([_DEFAULT], value=_DEFAULT, label="Method", scale=1, min_width=140)
        seed = gr.Textbox(label="Seed of the clip", placeholder="new", max_lines=1, scale=1, min_width=120)
    without = gr.Textbox(
        label="Words to leave out",
        info="Also makes the clip without them, from the same seed. May be empty.",
        max_lines=1,
    )
    with gr.Accordion("Settings", open=False):
        fields = SettingFields.make("Explain: ")
    buttons = Buttons.make("Explain")
    said = gr.HTML(elem_classes="said")
    shown = gr.HTML(note("Each word gets a band under the spectrogram: how much each moment owes to it."))
    inputs = [token, prompt, method, seed, without, *fields.all]
    buttons.connect(partial(explain, desk), inputs, said, shown, [prompt, without, seed])
    method.focus(partial(methods, desk), [token], [method], **QUIET)


async def methods(desk: Desk, token: str) -> Any:
    """Return the methods of the served model as choices; without an answer there is the default only."""
    try:
        found = (await desk.client(token).get_explainer(timeout=5)).methods
    except Exception:
        return gr.skip()
    return gr.update(choices=[_DEFAULT, *found])


async def explain(
    desk: Desk, token: str, prompt: str, method: str, seed: str, without: str, *settings: Any
) -> Updates:
    """Yield progress, problems, and the page of one explanation."""
    at, found, problems = ("sending", 0.0), list[Explanation](), list[str]()

    async def work(changed: Callable[[], None]) -> None:
        def on_update(update: ExplanationUpdate) -> None:
            nonlocal at
            at = stage_of(update)
            changed()

        def on_wait() -> None:
            nonlocal at
            at = WAITING, 0.0
            changed()

        try:
            options = Form.of(settings, seed=seed, encoding="flac").options()
            options.pop("clip_count")
            visitor = desk.visitor(token)
            attempt = partial(
                visitor.client.explain_audio,
                prompt,
                on_update=on_update,
                method=None if method == _DEFAULT else method,
                without=(without or "").strip() or None,
                **options,
            )
            found.append(await visitor.enter("explanation", attempt, on_wait))
        except Exception as error:
            problems.extend(sentences(error))

    yield progress(*at), ""
    async for _ in follow(work):
        yield progress(*at), gr.skip()
    yield problem(problems), await asyncio.to_thread(frame, found[0]) if found else gr.skip()


def stage_of(update: ExplanationUpdate) -> tuple[str, float]:
    """Return what is being done for an explanation, and the share of it that is done."""
    match update:
        case Queued(position=position):
            return f"queued behind {position}" if position else "next in the queue", 0.0
        case ExplanationProgress():
            return f"{100 * update.fraction:.0f} % is done", update.fraction


def frame(found: Explanation) -> str:
    """Return the page of an explanation as a frame, which grows to the height of its content."""
    page = html.escape(html_page([found]).decode())
    grow = "this.style.height=this.contentDocument.documentElement.scrollHeight+8+'px'"
    return f'<iframe class="explanation" title="Explanation" srcdoc="{page}" onload="{grow}"></iframe>'
