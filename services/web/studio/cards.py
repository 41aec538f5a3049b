"""Clips as HTML: a player, the waveform, the spectrogram, and what the services say of them.

Everything is in the text itself (data URIs), so that no file is kept and nothing is asked of anybody.
"""

import base64
import html
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.api.generation import Clip
from services.audio.spectrogram import SpectrogramConfig, hertz_ticks, plot_png, second_ticks
from services.web.shapes import CONTENT_TYPES
from services.web.studio.making import Judged, Order, Take
from services.web.studio.messages import problem, progress, warning
from services.web.studio.opinions import opinion, verdict

_CONFIG: Final = SpectrogramConfig(width=480, height=120)
_COLUMNS: Final = 240
"""Columns of a drawn waveform."""
_ORDERS: Final = {"reward": "the reward", "clap": "CLAP"}


def status(take: Take) -> str:
    """Return how far a call has come."""
    if take.stage in ("failed", "done"):
        return ""
    left = "" if take.seconds_left is None else f", about {max(1, round(take.seconds_left))} s left"
    return progress(f"{take.title}: {take.stage}{left}" if take.title else take.stage + left, take.fraction)


def messages(take: Take) -> str:
    """Return the problems and the warnings of a call."""
    return problem(take.problems) + warning(take.warnings)


def cards(take: Take, order: Order = "made") -> str:
    """Return all clips of a call, best first, as an ordered list."""
    ranked = take.ranked(order)
    known = [one for one in ranked if one.value(order) is not None]
    parts = []
    for place, one in enumerate(ranked, start=1):
        best = place == 1 and len(known) > 1
        badge = f"best of {len(ranked)} by {_ORDERS[order]}" if best else ""
        parts.append(card(take.prompt, one, badge))
    return f'<ol class="cards">{"".join(parts)}</ol>' if parts else ""


def card(prompt: str, judged: Judged, badge: str = "") -> str:
    """Return one clip."""
    clip = judged.clip
    name = f"Clip {clip.index + 1}"
    shown = html.escape(prompt)
    file = f"clip-{clip.seed}-{clip.index + 1}.{clip.encoding}"
    sound = data_uri(CONTENT_TYPES[clip.encoding], clip.audio)
    waveform_N = clip.waveform()
    tag = f' <span class="badge">{html.escape(badge)}</span>' if badge else ""
    return (
        f'<li class="card"><h3>{name}{tag}</h3>'
        f'<audio controls preload="metadata" aria-label="{name}: {shown}" src="{sound}"></audio>'
        f"{waveform_svg(waveform_N)}{spectrogram(clip, waveform_N, name)}"
        f"<dl>{''.join(_facts(judged))}</dl>"
        f'<p class="foot">Seed {clip.seed}, {clip.duration:.2f} s '
        f'<a download="{file}" href="{sound}" aria-label="Download {name}">Download</a></p></li>'
    )


def _facts(judged: Judged) -> list[str]:
    facts: list[tuple[str, str, str]] = []
    if judged.scores:
        scores = ", ".join(
            f"{name} {'can’t read the prompt' if value is None else f'{value:.3f}'}"
            for name, value in judged.scores.items()
        )
        facts.append(("CLAP score", scores, ""))
    if judged.reward is not None:
        kind = {"likes": "liked", "does not like": "disliked"}.get(verdict(judged.reward), "")
        facts.append(("Reward", opinion(judged.reward), kind))
    if judged.caption:
        facts.append(("Caption", judged.caption, ""))
    return [f'<dt>{name}</dt><dd class="{kind}">{html.escape(text)}</dd>' for name, text, kind in facts]


def waveform_svg(waveform_N: NDArray[np.float32]) -> str:
    """Return the envelope of a waveform [N] as a picture."""
    columns = np.array_split(waveform_N, min(_COLUMNS, max(1, len(waveform_N))))
    heights = [float(np.abs(column).max(initial=0.0)) for column in columns]
    top = " ".join(f"{x},{50 - 48 * height:.1f}" for x, height in enumerate(heights))
    bottom = " ".join(f"{x},{50 + 48 * height:.1f}" for x, height in reversed(list(enumerate(heights))))
    return (
        f'<svg class="waveform" viewBox="0 0 {len(heights) - 1 or 1} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="Waveform"><polygon points="{top} {bottom}"/></svg>'
    )


def spectrogram(clip: Clip, waveform_N: NDArray[np.float32], name: str) -> str:
    """Return the mel spectrogram of a clip with its axes."""
    picture = data_uri("image/png", plot_png(waveform_N, clip.sampling_rate, config=_CONFIG))
    hertz = "".join(
        f'<span style="bottom:{100 * height:.1f}%">{text}</span>'
        for text, height in hertz_ticks(clip.sampling_rate)
        if 0.1 < height < 0.97
    )
    ticks = second_ticks(clip.duration)
    seconds = "".join(
        f'<span style="left:{100 * second / clip.duration:.1f}%">{second:g}{"" if second else " s"}</span>'
        for second in ticks
        if second < 0.97 * clip.duration
    )
    return (
        f'<div class="spectrogram"><img alt="Spectrogram of {name}" src="{picture}">'
        f'<div class="hertz" aria-hidden="true">{hertz}</div>'
        f'<div class="seconds" aria-hidden="true">{seconds}</div></div>'
    )


def side_by_side(takes: Sequence[Take]) -> str:
    """Return the clips of several calls with the same seeds: a row per clip, a column per call."""
    most = max((len(take.clips) for take in takes), default=0)
    if not most:
        return ""
    columns = []
    for take in takes:
        model = "" if take.model is None else f"{take.model.name} {take.model.version}"
        columns.append(
            f"<section><h2>{html.escape(take.title)} <small>{html.escape(model)}</small></h2>"
            f"{cards(take)}</section>"
        )
    return f'<div class="columns">{"".join(columns)}</div>'


def data_uri(kind: str, content: bytes) -> str:
    """Return content as a URI."""
    return f"data:{kind.replace(' ', '')};base64,{base64.b64encode(content).decode()}"
