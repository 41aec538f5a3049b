"""Fourteen kinds of sound event, synthesised from random parameters.

Each synthesiser takes a random generator and a length in samples and returns float64 samples of that
length, peak about 1, that fill the length (repeated calls, strokes or ticks until it is full). They are
meant to be told apart by ear and on a spectrogram, not to be mistaken for recordings.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

SAMPLING_RATE = 16_000
"""Samples a second. Tango's rate."""

Samples = NDArray[np.float64]
Synthesiser = Callable[[np.random.Generator, int], Samples]


def _seconds(n: int) -> Samples:
    return np.arange(n) / SAMPLING_RATE


def _count(seconds: float) -> int:
    return int(seconds * SAMPLING_RATE)


def _tone(hertz: Samples | float, n: int, harmonics: list[float], phase: float = 0.0) -> Samples:
    """Sum of harmonics (amplitudes given from the fundamental up) of a constant or gliding pitch."""
    track = np.broadcast_to(np.asarray(hertz, dtype=np.float64), (n,))
    angle = 2 * np.pi * np.cumsum(track) / SAMPLING_RATE + phase
    total = np.zeros(n)
    for k, amplitude in enumerate(harmonics, start=1):
        # Partials above Nyquist would alias into other classes' bands.
        total += amplitude * np.sin(k * angle) * (k * track < 0.47 * SAMPLING_RATE)
    return total


def _band(noise: Samples, low: float, high: float, order: int = 2) -> Samples:
    nyquist = SAMPLING_RATE / 2
    sos = butter(order, [low / nyquist, min(high / nyquist, 0.99)], btype="band", output="sos")
    return np.asarray(sosfilt(sos, noise))


def _attack_decay(n: int, attack: float, decay: float) -> Samples:
    """Linear rise over `attack` seconds, exponential fall with time constant `decay`."""
    t = _seconds(n)
    return np.minimum(1.0, t / max(attack, 1e-4)) * np.exp(-np.maximum(0.0, t - attack) / decay)


def _edges(samples: Samples, seconds: float = 0.01) -> Samples:
    """Fade both ends, so that no event begins or ends with a click."""
    n = min(_count(seconds), len(samples) // 2)
    ramp = np.linspace(0.0, 1.0, n)
    out = samples.copy()
    out[:n] *= ramp
    out[len(out) - n :] *= ramp[::-1]
    return out


def _normalised(samples: Samples) -> Samples:
    return samples / max(float(np.abs(samples).max()), 1e-9)


def _repeat(
    rng: np.random.Generator, n: int, period: float, stroke: Callable[[], Samples], jitter: float = 0.05
) -> Samples:
    """Lay strokes `period` seconds apart (each moved by up to `jitter` of that) until `n` is full."""
    out = np.zeros(n)
    position = 0
    while position < n:
        one = stroke()[: n - position]
        out[position : position + len(one)] += one
        position += max(1, _count(period * (1 + jitter * rng.uniform(-1, 1))))
    return out


def dog(rng: np.random.Generator, n: int) -> Samples:
    """Short rough barks whose pitch rises and falls, 2 to 4 a second."""
    pitch, length = rng.uniform(300, 520), rng.uniform(0.12, 0.18)

    def bark() -> Samples:
        m = _count(length)
        t = np.linspace(0, 1, m)
        voice = _tone(pitch * (0.75 + 0.6 * np.sin(np.pi * t**0.7)), m, [0.6, 1.0, 0.9, 0.6, 0.4, 0.25, 0.15])
        breath = _band(rng.standard_normal(m), 600, 2600) * 0.7
        return (voice + breath) * np.sin(np.pi * np.minimum(1, t * 1.02)) ** 0.6

    return _repeat(rng, n, rng.uniform(0.26, 0.4), bark, 0.08)


def siren(rng: np.random.Generator, n: int) -> Samples:
    """A wail that sweeps up and down, 1 to 1.8 times a second."""
    low, span, rate = rng.uniform(600, 800), rng.uniform(500, 800), rng.uniform(1.0, 1.8)
    sweep = 0.5 - 0.5 * np.cos(2 * np.pi * (rate * _seconds(n) + rng.uniform(0, 1)))
    return _tone(low + span * sweep, n, [1.0, 0.35, 0.2, 0.08])


def bell(rng: np.random.Generator, n: int) -> Samples:
    """Struck metal: inharmonic partials, the high ones dying first; one or two strokes."""
    base = rng.uniform(420, 700)
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.51, 2.66, 3.01, 4.1, 5.4])
    decay = rng.uniform(0.35, 0.6)

    def stroke() -> Samples:
        t = _seconds(n)
        partials = [
            np.sin(2 * np.pi * base * r * t + rng.uniform(0, 6.28))
            * np.exp(-t / (decay / np.sqrt(r)))
            / (1 + 0.2 * r)
            for r in ratios
        ]
        return np.sum(partials, axis=0) * np.minimum(1, t / 0.003)

    return _repeat(rng, n, rng.uniform(0.5, 0.8), stroke, 0.02)


def bird(rng: np.random.Generator, n: int) -> Samples:
    """High chirps that sweep quickly, 5 to 9 a second."""
    centre, depth, length = rng.uniform(3200, 4600), rng.uniform(700, 1500), rng.uniform(0.06, 0.1)
    direction = rng.choice([-1.0, 1.0])

    def chirp() -> Samples:
        m = _count(length)
        t = np.linspace(-1, 1, m)
        return _tone(centre + direction * depth * t, m, [1.0, 0.1]) * np.cos(np.pi * t / 2)

    return _repeat(rng, n, rng.uniform(0.11, 0.2), chirp, 0.15)


def knock(rng: np.random.Generator, n: int) -> Samples:
    """Knuckles on wood: hollow low thumps, 4 to 6 a second."""
    pitch = rng.uniform(130, 240)

    def thump() -> Samples:
        m = _count(0.12)
        body = _tone(pitch, m, [1.0, 0.7, 0.3], rng.uniform(0, 6.28)) * _attack_decay(m, 0.002, 0.022)
        click = _band(rng.standard_normal(m), 300, 1200) * _attack_decay(m, 0.001, 0.008)
        return body + 0.8 * click

    return _repeat(rng, n, rng.uniform(0.16, 0.24), thump, 0.06)


def beep(rng: np.random.Generator, n: int) -> Samples:
    """An electronic tone, on and off, 3 to 5 times a second."""
    pitch, period, duty = rng.uniform(1500, 2600), rng.uniform(0.2, 0.32), rng.uniform(0.5, 0.65)

    def pip() -> Samples:
        m = _count(period * duty)
        return _edges(_tone(pitch, m, [1.0, 0.0, 0.2]), 0.005)

    return _repeat(rng, n, period, pip, 0.0)


def thunder(rng: np.random.Generator, n: int) -> Samples:
    """A crack that rolls away as a deep rumble."""
    rumble = _band(rng.standard_normal(n), 25, rng.uniform(110, 190), 2)
    slow = np.interp(np.arange(n), np.linspace(0, n, 12), rng.uniform(0.4, 1.0, 12))
    crack = _band(rng.standard_normal(n), 60, 900) * _attack_decay(n, 0.02, 0.12)
    return _normalised(rumble * slow * _attack_decay(n, 0.08, 0.8)) + 0.35 * _normalised(crack)


def rain(rng: np.random.Generator, n: int) -> Samples:
    """A steady broad hiss with drops in it."""
    hiss = _band(rng.standard_normal(n), rng.uniform(1200, 2000), 7800, 1)
    drops = np.zeros(n)
    places = rng.integers(0, n, size=max(1, int(n / SAMPLING_RATE * rng.uniform(60, 140))))
    drops[places] = rng.uniform(2, 8, len(places))
    return hiss + 0.8 * _band(drops, 2500, 7000)


def engine(rng: np.random.Generator, n: int) -> Samples:
    """A motor: a low buzz rich in harmonics that shakes with each turn."""
    pitch, wobble = rng.uniform(55, 95), rng.uniform(3, 6)
    t = _seconds(n)
    track = pitch * (1 + 0.03 * np.sin(2 * np.pi * wobble * t + rng.uniform(0, 6.28)))
    buzz = _tone(track, n, [1.0 / k**0.6 for k in range(1, 19)], rng.uniform(0, 6.28))
    shake = 0.7 + 0.3 * np.sin(2 * np.pi * np.cumsum(track / 4) / SAMPLING_RATE)
    return buzz * shake + 0.5 * _band(rng.standard_normal(n), 150, 900)


def glass(rng: np.random.Generator, n: int) -> Samples:
    """A pane that shatters: a bright crash, then shards that tinkle."""
    crash = _band(rng.standard_normal(n), 2500, 7800) * _attack_decay(n, 0.003, rng.uniform(0.08, 0.14))
    shards = np.zeros(n)
    for _ in range(int(rng.integers(14, 24))):
        start = min(n - 1, int(rng.beta(1.2, 2.5) * n))
        m = min(n - start, _count(0.15))
        ring = _tone(rng.uniform(3500, 7200), m, [1.0], rng.uniform(0, 6.28)) * _attack_decay(m, 0.001, 0.03)
        shards[start : start + m] += ring * rng.uniform(0.3, 1.0)
    return _normalised(crash) + 0.7 * _normalised(shards)


def footsteps(rng: np.random.Generator, n: int) -> Samples:
    """Steps on gravel: a heel and a scrape, about two a second."""

    def step() -> Samples:
        m = _count(0.2)
        heel = _band(rng.standard_normal(m), 80, 350) * _attack_decay(m, 0.004, 0.02)
        scrape = _band(rng.standard_normal(m), 900, 3500) * np.sin(np.pi * np.linspace(0, 1, m)) ** 2
        return _normalised(heel) + 0.45 * _normalised(scrape)

    return _repeat(rng, n, rng.uniform(0.38, 0.52), step, 0.06)


def cat(rng: np.random.Generator, n: int) -> Samples:
    """A meow: a long vowel that rises, opens and falls."""
    pitch, length = rng.uniform(480, 680), rng.uniform(0.5, 0.75)

    def meow() -> Samples:
        m = _count(length)
        t = np.linspace(0, 1, m)
        track = pitch * (0.8 + 0.5 * np.sin(np.pi * t**0.8)) * (1 + 0.01 * np.sin(2 * np.pi * 7 * t))
        opening = np.sin(np.pi * t) ** 0.7
        voice = _tone(track, m, [1.0, 0.5, 0.2]) + opening * _tone(track, m, [0, 0.3, 0.6, 0.5, 0.3])
        return voice * opening

    return _repeat(rng, n, length + rng.uniform(0.1, 0.25), meow, 0.05)


def horn(rng: np.random.Generator, n: int) -> Samples:
    """A car's horn: two steady brassy tones, one or two blasts."""
    low = rng.uniform(300, 420)
    ratio, blast = rng.choice([1.19, 1.25]), rng.uniform(0.35, 0.9)

    def honk() -> Samples:
        m = _count(blast)
        brass = [1.0, 0.9, 0.8, 0.6, 0.5, 0.35, 0.25, 0.15]
        return _edges(_tone(low, m, brass) + _tone(low * ratio, m, brass, rng.uniform(0, 6.28)), 0.015)

    return _repeat(rng, n, blast + rng.uniform(0.08, 0.15), honk, 0.0)


def clock(rng: np.random.Generator, n: int) -> Samples:
    """Ticks and tocks: dry high clicks in a strict rhythm, 5 to 7 a second."""
    high, period = rng.uniform(2600, 3600), rng.uniform(0.15, 0.2)
    parity = [0]

    def tick() -> Samples:
        m = _count(0.05)
        parity[0] ^= 1
        pitch = high if parity[0] else high * 0.75
        ring = _tone(pitch, m, [1.0, 0.4], rng.uniform(0, 6.28)) * _attack_decay(m, 0.001, 0.006)
        return ring + 0.3 * rng.standard_normal(m) * _attack_decay(m, 0.0005, 0.002)

    return _repeat(rng, n, period, tick, 0.0)


SYNTHESISERS: dict[str, Synthesiser] = {
    "dog": dog,
    "siren": siren,
    "bell": bell,
    "bird": bird,
    "knock": knock,
    "beep": beep,
    "thunder": thunder,
    "rain": rain,
    "engine": engine,
    "glass": glass,
    "footsteps": footsteps,
    "cat": cat,
    "horn": horn,
    "clock": clock,
}

CLASSES: tuple[str, ...] = tuple(SYNTHESISERS)
"""Event classes; an index into this tuple is the class label everywhere."""


def synthesise(event_class: str, rng: np.random.Generator, n: int) -> Samples:
    """One event of `n` samples: float64, faded at both ends, root mean square 1."""
    samples = _edges(SYNTHESISERS[event_class](rng, n), 0.02)
    return samples / max(float(np.sqrt(np.mean(samples**2))), 1e-9)
