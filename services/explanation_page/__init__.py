"""Write explanations of one clip: a page for browsers, a picture for papers, tables of numbers.

Every function takes one explanation per method, all of the same clip and words.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from services.api.explanation import (
    METHODS,
    OCCLUSION,
    REPLACED,
    VARIANTS,
    WITHOUT,
    Explanation,
    Variant,
)
from services.api.generation import Clip
from services.audio.spectrogram import (
    SpectrogramConfig,
    difference_png,
    hertz_ticks,
    log_mel_db,
    magma,
    mel_difference_db,
    plot_png,
    second_ticks,
)

_INK, _SOFT, _PAPER, _PANEL = (29, 29, 36), (93, 93, 107), (255, 255, 255), (246, 246, 248)
_ACCENT: Final = np.array((190, 52, 20))
_PAGE_DIGITS: Final = 5
"""Significant digits of the values in a page."""


def html_page(found: Sequence[Explanation]) -> bytes:
    """Return a page that needs no other file: player, spectrogram, a band per word, and the variants."""
    text = (files("services.explanation_page") / "page.html").read_text(encoding="utf-8")
    # "<" could end the script element.
    data = json.dumps(_page_data(found), ensure_ascii=False).replace("<", "\\u003c")
    return text.replace("__DATA__", data).encode()


def numbers_json(found: Sequence[Explanation]) -> bytes:
    """Return the explanations as JSON, without clips."""
    first = found[0]
    record = {
        "prompt": first.prompt,
        "words": first.words,
        "seed": first.seed,
        "model": {"name": first.model.name, "version": first.model.version, "digest": first.model.digest},
        "sampling_rate": first.clip.sampling_rate,
        "duration": round(first.clip.duration, 6),
        "warnings": list(dict.fromkeys(warning for one in found for warning in one.warnings)),
        "explanations": [
            {
                "method": one.method,
                "frame_seconds": one.frame_seconds,
                "matrix": [[float(f"{value:.7g}") for value in row] for row in one.matrix_WT.tolist()],
                "mask_size": one.mask_size,
                "iterations": one.iterations,
                "seconds": round(one.seconds, 3),
            }
            for one in found
        ],
        "variants": [{"kind": one.kind, "words": one.words, "prompt": one.prompt} for one in first.variants],
    }
    return (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode()


def numbers_npz(found: Sequence[Explanation]) -> bytes:
    """Return the explanations as NumPy's arrays, with the clip, its variants and their differences.

    ``matrix`` is that of the first method; each method has its own as ``matrix_METHOD``. Reading it needs no
    pickle.
    """
    first = found[0]
    rate = first.clip.sampling_rate
    waveform_N = first.clip.waveform()
    arrays: dict[str, Any] = {
        "matrix": first.matrix_WT,
        **{f"matrix_{one.method}": one.matrix_WT for one in found},
        "words": np.array(first.words),
        "frame_seconds": np.float64(first.frame_seconds),
        "methods": np.array([one.method for one in found]),
        "prompt": np.array(first.prompt),
        "seed": np.uint64(first.seed),
        "digest": np.array(first.model.digest),
        "sampling_rate": np.int64(rate),
        "audio": waveform_N,
    }
    for variant in first.variants:
        other_N = variant.clip.waveform()
        arrays[f"audio_{variant.kind}"] = other_N
        arrays[f"difference_db_{variant.kind}"] = mel_difference_db(waveform_N, other_N, rate).astype(
            np.float32
        )
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def picture_png(found: Sequence[Explanation], scale: int = 2) -> bytes:
    """Return a picture for print: spectrogram, and below it a band per word for each method.

    `scale` is pixels per point; the plot is 640 points wide.
    """
    first, width, tall, band = found[0], 640 * scale, 150 * scale, 18 * scale
    fonts = {size: ImageFont.load_default(size * scale) for size in (9, 11, 13)}
    labels = [(word, float(fonts[11].getlength(word))) for word in (_cut(word, 24) for word in first.words)]
    left = int(max(60 * scale, max(length for _, length in labels) + 14 * scale))
    head, axis = 26 * scale, 20 * scale
    block = band * len(labels) + 24 * scale
    picture = Image.new(
        "RGB", (left + width + 16 * scale, head + tall + axis + block * len(found) + 4 * scale), _PAPER
    )
    draw = ImageDraw.Draw(picture)
    draw.text((left, 6 * scale), _cut(first.prompt, 92), _INK, font=fonts[13])
    level = (log_mel_db(first.clip.waveform(), first.clip.sampling_rate) - _CONFIG.floor_db) / (
        _CONFIG.ceiling_db - _CONFIG.floor_db
    )
    plot = Image.fromarray(magma(np.clip(level[::-1], 0.0, 1.0)))
    picture.paste(plot.resize((width, tall), Image.Resampling.BILINEAR), (left, head))
    for name, height in hertz_ticks(first.clip.sampling_rate):
        y = head + tall * (1 - height)
        draw.line([(left - 3 * scale, y), (left, y)], _SOFT, width=scale)
        draw.text((left - 6 * scale, y), name, _SOFT, font=fonts[9], anchor="rm")
    duration = first.clip.duration
    for second in second_ticks(duration):
        x = left + width * second / duration
        draw.line([(x, head + tall), (x, head + tall + 3 * scale)], _SOFT, width=scale)
        draw.text((x, head + tall + 5 * scale), f"{second:g} s", _SOFT, font=fonts[9], anchor="mt")
    top = head + tall + axis
    for one in found:
        draw.text((left, top + 5 * scale), f"{one.method}: {METHODS[one.method]}", _SOFT, font=fonts[11])
        top += 22 * scale
        for (word, _), row_T in zip(labels, _shades(one), strict=True):
            draw.text((left - 6 * scale, top + band / 2), word, _INK, font=fonts[11], anchor="rm")
            draw.rectangle([left, top, left + width, top + band - 2 * scale], _PANEL)
            for frame, shade in enumerate(row_T.tolist()):
                start, end = (
                    left + min(width, round(edge * one.frame_seconds / duration * width))
                    for edge in (frame, frame + 1)
                )
                colour = tuple(int(c) for c in (1 - shade) * np.array(_PANEL) + shade * _ACCENT)
                if end > start:
                    draw.rectangle([start, top, end - 1, top + band - 2 * scale], colour)
            top += band
        top += 2 * scale
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True, dpi=(72 * scale, 72 * scale))
    return out.getvalue()


_CONFIG: Final = SpectrogramConfig()

WRITERS: Final[Mapping[str, Callable[[Sequence[Explanation]], bytes]]] = {
    ".html": html_page,
    ".json": numbers_json,
    ".npz": numbers_npz,
    ".png": picture_png,
}
"""What writes a file, by its extension."""


def written(found: Sequence[Explanation], path: Path) -> bytes:
    """Return the content of a file of explanations by its extension, one of `WRITERS`."""
    return WRITERS[path.suffix.lower()](found)


def _shades(one: Explanation) -> Any:
    """Return how strongly each value is drawn, 0 to 1: a squared change by its root."""
    share_WT = one.matrix_WT / max(float(one.matrix_WT.max(initial=0.0)), 1e-30)
    return np.sqrt(share_WT) if one.method == OCCLUSION else share_WT


def _page_data(found: Sequence[Explanation]) -> dict[str, Any]:
    first = found[0]
    facts = [("Model", f"{first.model.name} {first.model.version}"), ("seed", str(first.seed))]
    facts += [("digest", first.model.digest[:19])]
    facts += [("size of the mask", f"{one.mask_size:.3f}") for one in found if one.mask_size is not None]
    return {
        "prompt": first.prompt,
        "words": first.words,
        "duration": first.clip.duration,
        "facts": facts,
        "warnings": list(dict.fromkeys(warning for one in found for warning in one.warnings)),
        "audio": _sound_uri(first.clip),
        "spectrogram": _uri("image/png", plot_png(first.clip.waveform(), first.clip.sampling_rate)),
        "hertz": hertz_ticks(first.clip.sampling_rate),
        "ticks": [round(second, 3) for second in second_ticks(first.clip.duration)],
        "methods": [
            {
                "name": one.method,
                "meaning": _meaning(one),
                "root": one.method == OCCLUSION,
                "frame": one.frame_seconds,
                "values": [
                    [float(f"{value:.{_PAGE_DIGITS}g}") for value in row] for row in one.matrix_WT.tolist()
                ],
            }
            for one in found
        ],
        "variants": [_variant_data(variant, first.clip) for variant in first.variants],
    }


def _meaning(one: Explanation) -> str:
    meaning = METHODS.get(one.method, "")
    caution = (
        " Attention is where the model looks, not what it needs: see occlusion."
        if one.method == "attention"
        else " It explains this model, not what is in the sound."
    )
    return f"A band shows {meaning}.{caution}"


def _variant_data(variant: Variant, clip: Clip) -> dict[str, str]:
    titles = {
        WITHOUT: f"Without “{variant.words}”",
        REPLACED: f"“{variant.prompt}”",
    }
    sound, rate = variant.clip.waveform(), variant.clip.sampling_rate
    return {
        "title": titles.get(variant.kind, variant.kind.capitalize()),
        "meaning": f"The clip with {VARIANTS[variant.kind]}.",
        "audio": _sound_uri(variant.clip),
        "spectrogram": _uri("image/png", plot_png(sound, rate)),
        "difference": _uri("image/png", difference_png(clip.waveform(), sound, rate)),
    }


def _sound_uri(clip: Clip) -> str:
    return _uri("audio/wav", clip.encoded("wav", clip.sampling_rate).audio)


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
