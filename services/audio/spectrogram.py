"""Draw log-mel spectrograms as PNG pictures: for the CLI, the demo's page and sheets of many clips.

Needs NumPy and Pillow only, so that it works, like `AudioClient`, in an install without torch. The input of
models is computed by `services.models.mel`.

Shape legend: N samples, T frames, M mel bins, H x W pixels.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Waveform = NDArray[np.floating]
Pixels = NDArray[np.uint8]

# Matplotlib's `magma` at nine even steps; between them, linear.
_COLOURS = np.array(
    [
        (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122),
        (229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191),
    ],
    dtype=np.float64,
)  # fmt: skip
_MARGIN_LEFT, _MARGIN_BOTTOM, _TITLE_HEIGHT = 44, 22, 20
_INK, _PAPER = (40, 40, 48), (255, 255, 255)
_QUIETER, _LOUDER = (60, 120, 220), (230, 110, 30)
_OPAQUE_DB = 40.0
"""Difference that is drawn opaque."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrogramConfig:
    """How a spectrogram is computed and drawn."""

    mel_bins: int = 128
    """Rows of the spectrogram; more than a model's 64, since eyes resolve more."""
    n_fft: int = 1024
    """Samples in a window."""
    floor_db: float = -80.0
    """Level in dB, relative to a sine of full scale, that is drawn black."""
    ceiling_db: float = -15.0
    """Level in dB that is drawn brightest. Fixed, so that pictures of different clips can be compared."""
    width: int = 640
    """Width of the picture's plot in pixels, without its axes."""
    height: int = 192
    """Height of the picture's plot in pixels, without its axes."""


def _hertz_to_mel(hertz: float | NDArray[np.floating]) -> NDArray[np.float64]:
    """Convert hertz to HTK's mel scale: 2595 log10(1 + f / 700)."""
    return np.asarray(2595.0 * np.log10(1.0 + np.asarray(hertz, dtype=np.float64) / 700.0))


def _filterbank(sampling_rate: int, n_fft: int, mel_bins: int) -> NDArray[np.float64]:
    """Return triangles of unit area, evenly spaced in mel up to half the rate: [n_fft // 2 + 1, M]."""
    bins = _hertz_to_mel(np.fft.rfftfreq(n_fft, 1.0 / sampling_rate))[:, None]
    edges = np.linspace(0.0, float(_hertz_to_mel(sampling_rate / 2)), mel_bins + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rows = np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    # A triangle narrower than one FFT bin may contain none: it then takes the nearest.
    nearest = np.abs(bins - centre).argmin(axis=0)
    empty = np.flatnonzero(rows.sum(axis=0) == 0)
    rows[nearest[empty], empty] = 1.0
    return np.asarray(rows / rows.sum(axis=0))


def log_mel_db(
    waveform_N: Waveform, sampling_rate: int, config: SpectrogramConfig | None = None
) -> NDArray[np.float64]:
    """Return a mel spectrogram [M, T] in dB: a sine of full scale is near 0, silence at `config.floor_db`.

    `waveform_N` is mono in [-1, 1]; a clip shorter than a window is padded with silence.
    """
    config = config or SpectrogramConfig()
    hop = max(1, len(waveform_N) // (2 * config.width))
    padded = np.pad(np.asarray(waveform_N, dtype=np.float64), config.n_fft // 2)
    padded = np.pad(padded, (0, max(0, config.n_fft - len(padded))))
    frames_TN = np.lib.stride_tricks.sliding_window_view(padded, config.n_fft)[::hop]
    window = np.hanning(config.n_fft)
    power = np.abs(np.fft.rfft(frames_TN * window, axis=1)) ** 2 / (window.sum() / 2.0) ** 2
    mel_TM = power @ _filterbank(sampling_rate, config.n_fft, config.mel_bins)
    floor = 10.0 ** (config.floor_db / 10.0)
    return np.asarray(10.0 * np.log10(np.maximum(mel_TM.T, floor)))


def magma(level: NDArray[np.float64]) -> Pixels:
    """Return levels in [0, 1] as colours [..., 3]."""
    steps = np.linspace(0.0, 1.0, len(_COLOURS))
    channels = [np.interp(level, steps, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _second_ticks(duration: float) -> NDArray[np.float64]:
    """Return at most nine round numbers of seconds."""
    step = next((s for s in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0) if duration / s <= 8), 30.0)
    return np.arange(0.0, duration + 1e-9, step)


def _draw(waveform_N: Waveform, sampling_rate: int, title: str, config: SpectrogramConfig) -> Image.Image:
    """Draw one spectrogram with its axes and, if given, its title."""
    level = (log_mel_db(waveform_N, sampling_rate, config) - config.floor_db) / (
        config.ceiling_db - config.floor_db
    )
    plot = Image.fromarray(magma(np.clip(level[::-1], 0.0, 1.0)))
    plot = plot.resize((config.width, config.height), Image.Resampling.BILINEAR)
    top = _TITLE_HEIGHT if title else 6
    picture = Image.new(
        "RGB", (config.width + _MARGIN_LEFT + 12, config.height + top + _MARGIN_BOTTOM), _PAPER
    )
    picture.paste(plot, (_MARGIN_LEFT, top))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(11)
    draw.text((_MARGIN_LEFT, 3), title, _INK, font=ImageFont.load_default(12))
    bottom, duration = top + config.height, max(len(waveform_N) / sampling_rate, 1e-3)
    for second in _second_ticks(duration):
        x = _MARGIN_LEFT + config.width * float(second) / duration
        draw.line([(x, bottom), (x, bottom + 3)], _INK)
        draw.text((x, bottom + 4), f"{second:g} s", _INK, font=font, anchor="mt")
    for name, height in hertz_ticks(sampling_rate):
        y = bottom - config.height * height
        draw.line([(_MARGIN_LEFT - 3, y), (_MARGIN_LEFT, y)], _INK)
        draw.text((_MARGIN_LEFT - 5, y), name, _INK, font=font, anchor="rm")
    return picture


def plot_png(waveform_N: Waveform, sampling_rate: int, *, config: SpectrogramConfig | None = None) -> bytes:
    """Return a PNG of the mel spectrogram of one mono clip, without axes: they are the caller's."""
    config = config or SpectrogramConfig()
    level = (log_mel_db(waveform_N, sampling_rate, config) - config.floor_db) / (
        config.ceiling_db - config.floor_db
    )
    return _png(Image.fromarray(magma(np.clip(level[::-1], 0.0, 1.0))))


def difference_png(
    first_N: Waveform, second_N: Waveform, sampling_rate: int, *, config: SpectrogramConfig | None = None
) -> bytes:
    """Return a PNG of the second mel spectrogram minus the first, without axes, on a transparent ground.

    Blue is where the second is quieter, orange where it is louder; 40 dB are opaque.
    """
    difference_MT = mel_difference_db(first_N, second_N, sampling_rate, config)
    share_MT = np.clip(difference_MT[::-1] / _OPAQUE_DB, -1.0, 1.0)
    colours = np.where(share_MT[..., None] < 0, _QUIETER, _LOUDER)
    pixels = np.concatenate([colours, 255 * np.abs(share_MT)[..., None]], axis=-1)
    return _png(Image.fromarray(pixels.round().astype(np.uint8), "RGBA"))


def mel_difference_db(
    first_N: Waveform, second_N: Waveform, sampling_rate: int, config: SpectrogramConfig | None = None
) -> NDArray[np.float64]:
    """Return the second mel spectrogram minus the first, [M, T] in dB, of the length of the shorter."""
    first, second = (log_mel_db(one, sampling_rate, config) for one in (first_N, second_N))
    frames = min(first.shape[1], second.shape[1])
    return np.asarray(second[:, :frames] - first[:, :frames])


def second_ticks(duration: float) -> list[float]:
    """Return at most nine round numbers of seconds."""
    return [float(second) for second in _second_ticks(duration)]


def hertz_ticks(sampling_rate: int) -> list[tuple[str, float]]:
    """Return names of frequencies, and their heights as a share of a mel spectrogram's."""
    top_mel = float(_hertz_to_mel(sampling_rate / 2))
    return [
        (
            f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz",
            float(_hertz_to_mel(hertz)) / top_mel,
        )
        for hertz in (250, 1000, 2000, 4000, 8000, 16000)
        if hertz <= sampling_rate / 2
    ]


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return out.getvalue()


def spectrogram_png(
    waveform_N: Waveform, sampling_rate: int, *, title: str = "", config: SpectrogramConfig | None = None
) -> bytes:
    """Return a PNG of the mel spectrogram of one mono clip in [-1, 1], with axes in seconds and hertz."""
    return _png(_draw(waveform_N, sampling_rate, title, config or SpectrogramConfig()))


def spectrogram_sheet_png(
    clips: Sequence[tuple[str, Waveform]],
    sampling_rate: int,
    *,
    columns: int = 2,
    config: SpectrogramConfig | None = None,
) -> bytes:
    """Return a PNG of many clips, (title, waveform [N]) each, in `columns`, row by row."""
    if not clips:
        raise ValueError("a sheet needs at least one clip")
    config = config or SpectrogramConfig(width=400, height=128)
    pictures = [_draw(waveform, sampling_rate, title or " ", config) for title, waveform in clips]
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), _PAPER)
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (width * (index % columns), height * (index // columns)))
    return _png(sheet)
