"""The page of `milonga data check`: figures of a data set, and the spectrograms of its suspicious clips.

One file that needs no other and runs no script.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Final

from services.audio.spectrogram import SpectrogramConfig, plot_png
from training.data.examples import Clip
from training.data.health import KINDS, UNUSABLE, ClipHealth, DataHealth, Kind

MOST_CARDS: Final = 24
"""Clips of a kind that are drawn; the others are counted."""
_PICTURE: Final = SpectrogramConfig(mel_bins=96, width=360, height=110)
_MISSING: Final[tuple[Kind, ...]] = ("unreadable", "cut", "no caption", "unknown words")
"""Kinds whose clips are listed by name: a picture says nothing of them."""

_STYLE: Final = """
:root { --paper: #ffffff; --panel: #f6f6f8; --ink: #1d1d24; --soft: #5d5d6b; --line: #d9d9e0;
  --accent: #be3414; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15151a; --panel: #1f1f26; --ink: #ececf1; --soft: #a5a5b3; --line: #3a3a46;
    --accent: #ff9654; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .35rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; font-weight: 650; }
p { margin: .35rem 0; max-width: 46rem; }
.soft { color: var(--soft); font-size: .875rem; }
.warning { border-left: 3px solid var(--accent); padding-left: .7rem; font-size: .9375rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; } td.number { text-align: right; }
td.bar { width: 16rem; }
td.bar i { display: block; height: .7rem; margin-top: .4rem; background: var(--soft); border-radius: 2px;
  min-width: 2px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem;
  margin-top: .6rem; }
figure { margin: 0; background: var(--panel); border-radius: 4px; overflow: hidden; }
figure img { display: block; width: 100%; height: 7rem; background: #000004; }
figcaption { padding: .4rem .6rem .55rem; font-size: .8125rem; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); display: block; }
ul { font-size: .875rem; padding-left: 1.1rem; overflow-wrap: anywhere; } li span { color: var(--soft); }
"""


def html_page(health: DataHealth, clips: Sequence[Clip]) -> bytes:
    """Return the page; `clips` are those of `DataHealth.clips`, in the same order, and are read again."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>Health of {escape(health.source)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>Health of {escape(health.source)}</h1>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in health.warnings),
        "<h2>The data set</h2>",
        _table((f"<th>{escape(name)}</th><td>{escape(value)}</td>") for name, value in health.summary()),
        *_classes(health.classes),
        *_problems(health),
        *_captions(health.unusable_captions),
    ]
    by_clip = list(zip(health.clips, clips, strict=True))
    for kind in health.problems:
        of_kind = [(found, clip) for found, clip in by_clip if kind in found.problems]
        parts += _section(kind, of_kind)
    return "\n".join([*parts, "</main></body></html>", ""]).encode()


def _table(rows: Iterator[str]) -> str:
    return '<div class="scroll"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"


def _classes(classes: Mapping[str, int]) -> Iterator[str]:
    if classes:
        most = max(classes.values())
        yield "<h2>Usable clips of each class</h2>"
        yield _table(
            f'<th>{escape(name)}</th><td class="number">{count}</td>'
            f'<td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td>'
            for name, count in classes.items()
        )


def _problems(health: DataHealth) -> Iterator[str]:
    yield "<h2>What is wrong</h2>"
    if not health.problems:
        yield "<p>Nothing that this check knows.</p>"
        return
    yield _table(
        f'<th>{kind}</th><td class="number">{count}</td>'
        f"<td>{escape(KINDS[kind])}{'' if kind in UNUSABLE else '; usable'}</td>"
        for kind, count in health.problems.items()
    )


def _captions(unusable: Mapping[str, str]) -> Iterator[str]:
    if unusable:
        yield f"<h2>Unusable captions: {len(unusable)}</h2>"
        yield _list([f"{place} <span>{escape(reason)}</span>" for place, reason in unusable.items()])


def _section(kind: Kind, clips: Sequence[tuple[ClipHealth, Clip]]) -> Iterator[str]:
    yield f"<h2>{kind}: {len(clips)}</h2>"
    if kind in _MISSING:
        yield _list([f"{_name(found)} <span>{escape(found.problems[kind])}</span>" for found, _ in clips])
        return
    yield '<div class="cards">' + "".join(_card(kind, *one) for one in clips[:MOST_CARDS]) + "</div>"
    if len(clips) > MOST_CARDS:
        yield f'<p class="soft">and {len(clips) - MOST_CARDS} more; --json lists all</p>'


def _card(kind: Kind, found: ClipHealth, clip: Clip) -> str:
    waveform, rate = clip.read()
    mono_N = waveform.mean(axis=0) if waveform.ndim == 2 else waveform
    picture = base64.b64encode(plot_png(mono_N, rate, config=_PICTURE)).decode()
    peak = "no sound" if found.peak_db is None else f"peak {found.peak_db:.1f} dB"
    facts = f"{found.seconds:.2f} s, {rate} Hz, {peak}" + (f"; {found.sound}" if found.sound else "")
    written = f"as {found.problems[kind]}" if kind == "duplicate" else found.problems[kind]
    detail = f"<span>{escape(written)}</span>" if written else ""
    return (
        f'<figure><img alt="Spectrogram" src="data:image/png;base64,{picture}">'
        f"<figcaption>{_name(found)}<span>{escape(facts)}</span>{detail}</figcaption></figure>"
    )


def _name(found: ClipHealth) -> str:
    return escape(f"{found.place}: {found.name}" if found.place else found.name)


def _list(items: Sequence[str]) -> str:
    more = [f"and {len(items) - 200} more"] if len(items) > 200 else []
    return "<ul>" + "".join(f"<li>{item}</li>" for item in [*items[:200], *more]) + "</ul>"
