"""The page of `milonga data check`: figures of a data set, and the spectrograms of its suspicious clips."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Final

from training.commands.pages import cards, page, spectrogram, table
from training.data.examples import Clip
from training.data.health import KINDS, UNUSABLE, ClipHealth, DataHealth, Kind

MOST_CARDS: Final = 24
"""Clips of a kind that are drawn; the others are counted."""
_MISSING: Final[tuple[Kind, ...]] = ("unreadable", "cut", "no caption", "unknown words")
"""Kinds whose clips are listed by name: a picture says nothing of them."""


def html_page(health: DataHealth, clips: Sequence[Clip]) -> bytes:
    """Return the page; `clips` are those of `DataHealth.clips`, in the same order, and are read again."""
    parts = [
        *(f'<p class="warning">{escape(warning)}</p>' for warning in health.warnings),
        "<h2>The data set</h2>",
        table(f"<th>{escape(name)}</th><td>{escape(value)}</td>" for name, value in health.summary()),
        *_classes(health.classes),
        *_problems(health),
        *_captions(health.unusable_captions),
    ]
    by_clip = list(zip(health.clips, clips, strict=True))
    for kind in health.problems:
        of_kind = [(found, clip) for found, clip in by_clip if kind in found.problems]
        parts += _section(kind, of_kind)
    return page(f"Health of {health.source}", parts)


def _classes(classes: Mapping[str, int]) -> Iterator[str]:
    if classes:
        most = max(classes.values())
        yield "<h2>Usable clips of each class</h2>"
        yield table(
            f'<th>{escape(name)}</th><td class="number">{count}</td>'
            f'<td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td>'
            for name, count in classes.items()
        )


def _problems(health: DataHealth) -> Iterator[str]:
    yield "<h2>What is wrong</h2>"
    if not health.problems:
        yield "<p>Nothing that this check knows.</p>"
        return
    yield table(
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
    yield cards(_card(kind, *one) for one in clips[:MOST_CARDS])
    if len(clips) > MOST_CARDS:
        yield f'<p class="soft">and {len(clips) - MOST_CARDS} more; --json lists all</p>'


def _card(kind: Kind, found: ClipHealth, clip: Clip) -> str:
    waveform, rate = clip.read()
    mono_N = waveform.mean(axis=0) if waveform.ndim == 2 else waveform
    peak = "no sound" if found.peak_db is None else f"peak {found.peak_db:.1f} dB"
    facts = f"{found.seconds:.2f} s, {rate} Hz, {peak}" + (f"; {found.sound}" if found.sound else "")
    written = f"as {found.problems[kind]}" if kind == "duplicate" else found.problems[kind]
    detail = f"<span>{escape(written)}</span>" if written else ""
    return (
        f"<figure>{spectrogram(mono_N, rate)}"
        f"<figcaption>{_name(found)}<span>{escape(facts)}</span>{detail}</figcaption></figure>"
    )


def _name(found: ClipHealth) -> str:
    return escape(f"{found.place}: {found.name}" if found.place else found.name)


def _list(items: Sequence[str]) -> str:
    more = [f"and {len(items) - 200} more"] if len(items) > 200 else []
    return "<ul>" + "".join(f"<li>{item}</li>" for item in [*items[:200], *more]) + "</ul>"
