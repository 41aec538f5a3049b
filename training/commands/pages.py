"""Pages that need no other file and run no script: what the pages of several commands share."""

import base64
from collections.abc import Iterable
from html import escape
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.audio.spectrogram import SpectrogramConfig, plot_png

PICTURE: Final = SpectrogramConfig(mel_bins=96, width=360, height=110)
"""The spectrogram of a card."""

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
h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; font-weight: 650; overflow-wrap: anywhere; }
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
figure audio { display: block; width: calc(100% - 1.2rem); height: 2.4rem; margin: .6rem .6rem 0; }
figcaption { padding: .4rem .6rem .55rem; font-size: .8125rem; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); display: block; }
ul { font-size: .875rem; padding-left: 1.1rem; overflow-wrap: anywhere; } li span { color: var(--soft); }
"""


def page(title: str, parts: Iterable[str]) -> bytes:
    """Return a page with a heading and parts in HTML; pictures and sounds are in the page itself."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "media-src data:; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</main></body></html>",
            "",
        ]
    ).encode()


def table(rows: Iterable[str]) -> str:
    """Return a table of rows of cells in HTML."""
    return '<div class="scroll"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"


def cards(figures: Iterable[str]) -> str:
    """Return a grid of figures in HTML."""
    return '<div class="cards">' + "".join(figures) + "</div>"


def spectrogram(mono_N: NDArray[np.float32], sampling_rate: int) -> str:
    """Return the picture of a clip."""
    return (
        f'<img alt="Spectrogram" src="{_data("image/png", plot_png(mono_N, sampling_rate, config=PICTURE))}">'
    )


def player(flac: bytes) -> str:
    """Return a player of a clip in FLAC."""
    return f'<audio controls preload="metadata" src="{_data("audio/flac", flac)}"></audio>'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
