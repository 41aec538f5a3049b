"""How much of a watermark survives: MP3, Opus, resampling, trimming, noise, gain.

    python -m benchmarks.watermark --generator generator_base.pth --detector detector_base.pth [--clips 20]

Clips of `mini` are marked, changed, and given to the detector; so are the same clips without a watermark, for
false alarms. Needs the extra `watermark` and the released checkpoints. With files of random weights it shows
that everything runs, and nothing else.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.measuring import machine, versions, write_report
from services.audio.decoding import AudioBounds, decode
from services.audio.encoding import encode_audio
from services.audio.resampling import resample
from services.local import open_clip_maker
from services.models.watermark import BITS, Detection, WatermarkDetector, Waveform, message_of
from services.models.watermark.audioseal import AudioSealDetector, AudioSealWatermark
from services.weights.uri import resolve

RATE: Final = 16_000
PROMPTS: Final = ("A dog barks then a siren wails", "Rain falls", "A cat meows after a bell tolls")


def encoded(encoding: str) -> Callable[[Waveform], Waveform]:
    """Return a change: the clip as a file of a lossy encoding."""

    def change(clip_N: Waveform) -> Waveform:
        file = encode_audio(clip_N, RATE, encoding)
        found = decode(file, "clip", AudioBounds())
        return np.asarray(resample(found.waveform, found.sampling_rate, RATE), np.float32)

    return change


def resampled(rate: int) -> Callable[[Waveform], Waveform]:
    """Return a change: the clip at another rate, and back."""
    return lambda clip_N: resample(resample(clip_N, RATE, rate), rate, RATE).astype(np.float32)


def noisy(clip_N: Waveform) -> Waveform:
    """Add white noise, 30 dB below the clip."""
    level = float(np.sqrt(np.mean(np.square(clip_N)))) * 10 ** (-30 / 20)
    drawn_N = np.random.default_rng(0).standard_normal(len(clip_N))
    return np.clip(clip_N + level * drawn_N, -1, 1).astype(np.float32)


CHANGES: Final[Mapping[str, Callable[[Waveform], Waveform]]] = {
    "none": lambda clip_N: clip_N,
    "MP3": encoded("mp3"),
    "Opus": encoded("opus"),
    "Vorbis": encoded("ogg"),
    "8 kHz and back": resampled(8_000),
    "44.1 kHz and back": resampled(44_100),
    "without the first 0.5 s": lambda clip_N: clip_N[RATE // 2 :],
    "the middle second": lambda clip_N: clip_N[len(clip_N) // 2 - RATE // 2 : len(clip_N) // 2 + RATE // 2],
    "half as loud": lambda clip_N: np.multiply(clip_N, 0.5, dtype=np.float32),
    "noise at 30 dB": noisy,
}


def bits_right(found: Detection, message: int) -> int:
    """Return how many of the message's bits are right."""
    return BITS - (found.message ^ message).bit_count()


def survival(
    clips: list[Waveform], marked: list[Waveform], detector: WatermarkDetector, message: int
) -> dict[str, dict[str, float]]:
    """Return for each change the shares of marked clips found, of bits right, and of false alarms."""
    table = {}
    for name, change in CHANGES.items():
        found = [detector.detect(change(clip_N), RATE) for clip_N in marked]
        alarms = [detector.detect(change(clip_N), RATE).marked for clip_N in clips]
        table[name] = {
            "found": float(np.mean([one.marked for one in found])),
            "bits_right": float(np.mean([bits_right(one, message) for one in found])) / BITS,
            "false_alarms": float(np.mean(alarms)),
        }
    return table


def signal_to_noise(clip_N: Waveform, marked_N: Waveform) -> float:
    """Return the ratio of a clip to its watermark in dB."""
    mark = float(np.mean(np.square(marked_N - clip_N)))
    return 10 * float(np.log10(np.mean(np.square(clip_N)) / mark))


def main() -> None:
    """Mark, change, detect; print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generator", type=Path, required=True)
    parser.add_argument("--detector", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("build/bench/watermark.json"))
    arguments = parser.parse_args()
    watermark, detector = AudioSealWatermark(arguments.generator), AudioSealDetector(arguments.detector)
    model = resolve("mini")
    maker, message = open_clip_maker(model, device="cpu"), message_of(model.digest)
    try:
        made = [
            maker.generate(PROMPTS[number % len(PROMPTS)], seed=number, encoding="float32").clips[0]
            for number in range(arguments.clips)
        ]
    finally:
        maker.close()
    clips = [clip.waveform() for clip in made]
    marked = [watermark.embed(clip_N, RATE, message) for clip_N in clips]
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions("audioseal", "torch"),
        "clips": len(clips),
        "signal_to_noise_db": round(float(np.mean(list(map(signal_to_noise, clips, marked)))), 1),
        "changes": survival(clips, marked, detector, message),
    }
    write_report(arguments.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
