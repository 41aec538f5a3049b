"""The tab *Rate*: blind pairs from the database of ratings, one after another.

The page keeps the rater's token, and nothing else: which pair is next, and which was rated last, the database
says. So a reload, or another replica of the web door, changes nothing.
"""

import asyncio
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import gradio as gr

from services.errors import UnauthenticatedError
from services.web.studio.desk import Desk
from services.web.studio.fields import QUIET
from services.web.studio.messages import note, problem, sentences

if TYPE_CHECKING:
    from services.ratings.store import RatingStore, Verdict

WITHOUT_STORE: Final = "Ratings need a database: start the web door with --ratings sqlite:///ratings.db."
_NOT_SAVED: Final = "Not saved, and nothing is lost: the pair stays here."
_UNKNOWN: Final = "No rater has this token. Enter the one that you were given."
PRESENT, IN_ORDER = "every event is there", "in order"
VERDICTS: Final[Mapping[str, "Verdict"]] = {
    "1 Left": "left",
    "2 Right": "right",
    "3 Both good": "both_good",
    "4 Both bad": "both_bad",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What a rater sees."""

    pair: str | None
    """The pair as HTML; None: the one that is shown stays."""
    said: str = ""
    """Counts, problems and the end."""
    item: int | None = None
    """Number of the pair; None: there is none."""
    entered: bool = False
    """Whether the rater is known."""


def show(store: "RatingStore", token: str) -> View:
    """Return the next pair of the rater with a token."""
    if not token.strip():
        return View(pair="", said=note("Enter the token that you were given, to see your first pair."))
    try:
        rater = store.rater(token.strip())
        shown, done, total = store.next_item(rater)
    except UnauthenticatedError:
        return View(pair="", said=problem([_UNKNOWN]))
    except Exception as error:
        return View(pair=None, said=problem(_sentences(error)))
    count = f'<p class="count" role="status">{done} of {total} rated by {html.escape(rater.name)}</p>'
    if shown is None:
        end = "All pairs are rated. Thank you." if total else "There are no pairs to rate yet."
        return View(pair=f'<p class="end" role="status">{end}</p>', said=count, entered=True)
    return View(pair=_pair(shown.prompt, shown.left, shown.right), said=count, item=shown.id, entered=True)


def rate(
    store: "RatingStore",
    verdict: str,
    token: str,
    item: float | None,
    counts: bool,
    left: Sequence[str],
    right: Sequence[str],
) -> View:
    """Save the verdict on pair `item`; return the next. `counts`: whether the absolute answers count.

    The pair is that which the rater saw when they answered: a second, hasty answer replaces the first one.
    """
    from services.ratings.store import Answers

    if item is None:
        return show(store, token)
    answers = None
    if counts:
        answers = Answers(
            left_present=PRESENT in left,
            left_in_order=IN_ORDER in left,
            right_present=PRESENT in right,
            right_in_order=IN_ORDER in right,
        )
    try:
        store.rate(store.rater(token.strip()), int(item), VERDICTS[verdict], answers)
    except Exception as error:
        return View(pair=None, said=problem([_NOT_SAVED, *_sentences(error)]))
    return show(store, token)


def take_back(store: "RatingStore", token: str) -> View:
    """Take the rater's last rating back; return the pair, which is to be rated again."""
    try:
        rater = store.rater(token.strip())
        last = store.last_item(rater)
        if last is None:
            return View(pair=None, said=note("There is no rating to take back."))
        store.rate(rater, last.id, None)
    except Exception as error:
        return View(pair=None, said=problem([_NOT_SAVED, *_sentences(error)]))
    view = show(store, token)
    said = note("Taken back: rate this pair again.") + view.said
    return View(pair=_pair(last.prompt, last.left, last.right), said=said, item=last.id, entered=True)


def _sentences(error: Exception) -> list[str]:
    return [_UNKNOWN] if isinstance(error, UnauthenticatedError) else sentences(error)


def _pair(prompt: str, left: str, right: str) -> str:
    sides = "".join(
        f'<figure><figcaption>{name}</figcaption><audio controls preload="auto" id="rate-{name.lower()}" '
        f'aria-label="{name} clip" src="/v1/ratings/clips/{digest}"></audio></figure>'
        for name, digest in (("Left", left), ("Right", right))
    )
    return (
        f'<p class="ask">Which clip is the better answer to this prompt?</p>'
        f'<p class="prompt">{html.escape(prompt)}</p><div class="pair">{sides}</div>'
    )


def agreement(store: "RatingStore", token: str) -> str:
    """Return how far the raters agree, and how reliable each is, as HTML. It says nothing of the models."""
    from services.ratings.store import summary

    try:
        store.rater(token.strip())
        found = summary(store.ratings())
    except Exception as error:
        return problem(_sentences(error))
    alpha = found["krippendorff_alpha"]
    shown = "not known: no pair has two ratings that could differ" if alpha is None else f"{alpha:.2f}"
    rows = "".join(
        f"<tr><th>{html.escape(name)}<td>{one['ratings']}<td>{_share(one['consistency'], one['repeats'])}"
        f"<td>{_share(one['known_right'], one['known'])}"
        for name, one in found["raters"].items()
    )
    return (
        f"<p>Agreement (Krippendorff’s alpha; 1: all agree, 0: chance): {shown}</p>"
        '<div class="scroll"><table><thead><tr><th>Rater<th>Ratings<th>As before on repeats'
        f"<th>Right on known pairs<tbody>{rows}</table></div>"
    )


def _share(share: float | None, count: int) -> str:
    return "–" if share is None else f"{100 * share:.0f} % of {count}"


def rate_tab(desk: Desk) -> tuple[Any, dict[str, Any]] | None:
    """Create the tab. Return the field of the rater's token, and the event that enters with it."""
    store = desk.store
    if store is None:
        gr.HTML(note(WITHOUT_STORE))
        return None
    with gr.Accordion("Who rates", open=True) as who:
        token = gr.Textbox(label="Your rater’s token", type="password", elem_id="rater", show_label=True)
        enter = gr.Button("Enter", elem_id="rate-enter", elem_classes="narrow")
    said, pair, item = gr.HTML(), gr.HTML(elem_id="rate-pair"), gr.Number(visible=False, precision=0)
    with gr.Column(visible=False) as answer:
        with gr.Row(elem_classes="verdicts"):
            buttons = [
                gr.Button(text, elem_id=f"rate-{number}", min_width=120, variant="primary")
                for number, text in enumerate(VERDICTS, start=1)
            ]
        with gr.Row():
            left = gr.CheckboxGroup([PRESENT, IN_ORDER], label="Left clip", min_width=220)
            right = gr.CheckboxGroup([PRESENT, IN_ORDER], label="Right clip", min_width=220)
        counts = gr.Checkbox(label="My answers on the single clips count", value=False)
        gr.HTML(note("Keys: 1 to 4 rate, q plays the left clip, w the right one."))
    back = gr.Button("Take the last one back", elem_id="rate-back", elem_classes="narrow", visible=False)
    with gr.Accordion("Agreement between raters", open=False) as agreed:
        table = gr.HTML()
    outputs = [who, pair, said, item, answer, back, counts, left, right]

    def updates(view: View) -> tuple[Any, ...]:
        if view.pair is None:  # what is shown stays
            return gr.skip(), gr.skip(), view.said, *(gr.skip(),) * 6
        closed, entered = gr.update(open=not view.entered), gr.update(visible=view.entered)
        can_answer = gr.update(visible=view.item is not None)
        return closed, view.pair, view.said, view.item, can_answer, entered, False, [], []

    async def on(work: Any, *values: Any) -> tuple[Any, ...]:
        return updates(await asyncio.to_thread(work, *values))

    entering = {"fn": partial(on, partial(show, store)), "inputs": [token], "outputs": outputs, **QUIET}
    gr.on([enter.click, token.submit], **entering)
    for button in buttons:
        button.click(
            partial(on, partial(rate, store, button.value)),
            [token, item, counts, left, right],
            outputs,
            **QUIET,
        )
    back.click(partial(on, partial(take_back, store)), [token], outputs, **QUIET)

    async def agree(given: str) -> str:
        return await asyncio.to_thread(agreement, store, given)

    agreed.expand(agree, [token], [table], **QUIET)
    return token, entering
