"""The tabs *Create* and *Compare*: clips of a prompt; of two settings or models with the same seeds."""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import gradio as gr

from services.api.generation import GenerationModel
from services.web.studio.cards import cards, messages, side_by_side, status
from services.web.studio.desk import Desk
from services.web.studio.fields import Buttons, SettingFields, Updates, short_text
from services.web.studio.making import FORMATS, Form, Order, Take, Work, follow, make
from services.web.studio.messages import note, problem, sentences

_ORDERS: Final[Mapping[str, Order]] = {
    "reward": "reward",
    "CLAP score": "clap",
    "as made": "made",
}
_SERVED, _CHALLENGER = "served", "challenger"
_SEED_BITS: Final = 32


def create_tab(desk: Desk, token: Any) -> Any:
    """Create the tab that makes clips; return what shows the served model."""
    needs = {"reward": "reward", "clap": "scoring"}
    orders = [name for name, order in _ORDERS.items() if order == "made" or needs[order] in desk.judges]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                label="Prompt", placeholder="A dog barks then a siren wails", lines=1, max_lines=4
            )
            with gr.Row():
                count = gr.Slider(1, 8, value=4, step=1, label="Clips", min_width=150)
                order = gr.Dropdown(orders, value=orders[0], label="Best first by", min_width=150)
            buttons = Buttons.make("Make clips")
            with gr.Group():
                fields = SettingFields.make()
                with gr.Row():
                    seed = short_text("Seed", "new")
                    encoding = gr.Dropdown(list(FORMATS), value=FORMATS[0], label="Format", min_width=90)
            facts = gr.HTML()
        with gr.Column(scale=5, min_width=300):
            said, shown = gr.HTML(elem_classes="said"), gr.HTML(note("Clips appear here."))
    inputs = [token, prompt, count, order, seed, encoding, *fields.all]
    buttons.connect(partial(create, desk), inputs, said, shown, [prompt, seed])
    return facts


async def create(
    desk: Desk,
    token: str,
    prompt: str,
    count: float,
    order: str,
    seed: str,
    encoding: str,
    *settings: Any,
) -> Updates:
    """Yield progress, messages and clips of one call."""
    take, by = Take(prompt=prompt), _ORDERS[order]
    form = Form.of(settings, seed=seed, clips=count, encoding=encoding)
    work = partial(_make, desk, token, take, form)
    async for update in _follow([take], lambda: cards(take, by), work):
        yield update


async def _make(
    desk: Desk, token: str, take: Take, form: Form, changed: Callable[[], None], *, challenger: bool = False
) -> None:
    """Make clips as the form says; what is wrong with it becomes a problem of the take."""
    try:
        visitor, options = desk.visitor(token, challenger=challenger), form.options()
    except Exception as error:
        take.problems, take.stage = sentences(error), "failed"
        return
    await make(take, visitor, options, judges=desk.judges, signer=desk.signer, changed=changed)


async def _follow(takes: list[Take], draw: Callable[[], str], *works: Work) -> Updates:
    """Yield progress, messages and clips whenever a take has changed. Drawing leaves the event loop free."""
    drawn: list[int] = []
    yield "".join(map(status, takes)), ""
    async for _ in follow(*works):
        editions, shown = [take.edition for take in takes], gr.skip()
        if editions != drawn and any(editions):
            drawn, shown = editions, await asyncio.to_thread(draw)
        yield "".join(map(status, takes)) + "".join(map(messages, takes)), shown


def compare_tab(desk: Desk, token: Any) -> None:
    """Create the tab that compares two settings, or two models."""
    models = [_SERVED, *([_CHALLENGER] if desk.settings.challenger else [])]
    with gr.Row():
        prompt = gr.Textbox(label="Prompt to compare", lines=1, max_lines=4, scale=3, min_width=260)
        count = gr.Slider(1, 4, value=2, step=1, label="Clips of each", scale=1, min_width=140)
        seed = gr.Textbox(label="Seed of both", placeholder="new", max_lines=1, scale=1, min_width=120)
    sides = []
    with gr.Row():
        for name, model in (("A", models[0]), ("B", models[-1])):
            with gr.Column(min_width=280), gr.Group():
                served = gr.Radio(models, value=model, label=f"{name}: Model", visible=len(models) > 1)
                sides.append([served, *SettingFields.make(f"{name}: ").all])
    if len(models) == 1:
        gr.HTML(note("To compare two models, start the web door with --challenger HOST:PORT."))
    buttons = Buttons.make("Make both")
    said = gr.HTML(elem_classes="said")
    shown = gr.HTML(note("Both sides appear here, made from the same seed."))
    inputs = [token, prompt, count, seed, *sides[0], *sides[1]]
    buttons.connect(partial(compare, desk), inputs, said, shown, [prompt, seed])


async def compare(desk: Desk, token: str, prompt: str, count: float, seed: str, *values: Any) -> Updates:
    """Yield progress, messages and clips of two calls with the same seed. `values` are of A, then of B."""
    half = len(values) // 2
    shared = seed.strip() or str(secrets.randbits(_SEED_BITS))
    takes, works = [Take(prompt=prompt, title=title) for title in "AB"], []
    for take, (model, *settings) in zip(takes, (values[:half], values[half:]), strict=True):
        form = Form.of(settings, seed=shared, clips=count)
        works.append(partial(_make, desk, token, take, form, challenger=model == _CHALLENGER))
    async for update in _follow(takes, lambda: side_by_side(takes), *works):
        yield update


async def served_facts(desk: Desk, token: str) -> str:
    """Return a line on the served generator, or why there is none."""
    try:
        return note(describe(await desk.client(token).get_model(timeout=5)))
    except Exception as error:
        return problem(sentences(error))


def describe(served: GenerationModel) -> str:
    """Return a model with its ranges and defaults in a line."""
    limits, defaults = served.limits, served.defaults
    return (
        f"The model is {served.model.name} {served.model.version}. Defaults: {defaults.num_inference_steps} "
        f"steps (up to {limits.max_steps}), guidance {defaults.guidance_scale:g} (up to "
        f"{limits.max_guidance_scale:g}), {defaults.duration:g} s ({limits.min_duration:g} to "
        f"{limits.max_duration:g})."
    )
