"""Preference data from the sound world: clips that match a prompt, and clips that nearly do.

A contrast is a truth and the same truth with one mistake (order swapped, an event missing or replaced), or at
times an unrelated truth; a clip of each and a prompt of each. Crossed, they are four labels and two pairs.
Each clip is right for one prompt and wrong for the other, so neither prompts nor clips alone determine which
one is preferred. Everything is a function of (seed, split, index).
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from services.models.clap.model import Waveform
from services.models.latent import clip_generator
from services.models.manifest import read_manifest
from services.models.mini import mini_folder
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from training.data.examples import Clip, Examples, Labelled, Pair
from training.soundworld.captions import CaptionTruth, drop, replace_event, swap, write_caption
from training.soundworld.scenes import SceneConfig, Split, draw_truth, render, split_of
from training.soundworld.synthesis import SAMPLING_RATE

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
GAIN = (-8.0, 2.0)
"""Bounds in dB of a clip's gain."""
MISTAKES = {
    "then": (("swapped", 0.5), ("missing", 0.15), ("replaced", 0.15), ("other", 0.2)),
    "while": (("missing", 0.4), ("replaced", 0.4), ("other", 0.2)),
    "single": (("replaced", 0.7), ("other", 0.3)),
}
"""Mistakes by the relation of the events, and how often each is made. `other`: an
unrelated clip. A model that has only met near misses may prefer clips unrelated to the prompt."""
BACKWARDS = {"swapped": "swapped", "missing": "added", "replaced": "replaced", "other": "other"}
"""What is wrong with the right clip, for the prompt of the mistaken one."""
WORDINGS = 64
"""Wordings to try before a truth counts as having none in a split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundworldData:
    """How many contrasts, of what, and how reliable the annotators are."""

    contrasts: int
    """Contrasts to learn from."""
    held_out: int = 200
    """Contrasts of the validation split, and as many of the test split."""
    generated: int = 0
    """Further contrasts of the test split, whose clips `model` generates from the two prompts."""
    seed: int = 1_010
    """Not one of the CLAP models' training seeds."""
    long: float = 0.2
    """Share of clips of 5.12 s; the others have 2.56."""
    rebuilt: float = 0.3
    """Share of contrasts whose clips went through `model`'s autoencoder and vocoder, as generated ones do."""
    model: str = "mini"
    """Member of the mini family that rebuilds and generates."""
    noise: float = 0.0
    """Probability that an annotator errs (in training; held-out examples are labelled by the oracle)."""
    annotators: int = 1
    """Annotators of an example, of whom the majority decides: an odd number."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 0.5:
            raise ValueError(f"noise is {self.noise}, must be at least 0 and below 0.5")
        if self.annotators % 2 != 1:
            raise ValueError(f"annotators is {self.annotators}, must be odd")
        for name in ("long", "rebuilt"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneClip:
    """A clip rendered from a truth, and with `model` reconstructed by its autoencoder and vocoder."""

    truth: CaptionTruth
    seed: tuple[int, ...]
    duration: float
    """Seconds."""
    gain: float
    """dB."""
    model: str | None = None

    @property
    def name(self) -> str:
        """The seed's numbers and the events."""
        return f"scene {'-'.join(map(str, self.seed))} ({', '.join(self.truth.classes)})"

    @property
    def domain(self) -> str:
        """Whether it was rebuilt."""
        return "real" if self.model is None else "rebuilt"

    @property
    def digest(self) -> str:
        """SHA-256 of all that determines the clip, the model included."""
        return _digest("scene", asdict(self), self.model)

    def read(self) -> tuple[Waveform, int]:
        """Render it."""
        waveform, _ = render(self.truth, self.duration, np.random.default_rng(self.seed))
        waveform = waveform * np.float32(10 ** (self.gain / 20))
        return waveform if self.model is None else _rebuild(waveform, self.model), SAMPLING_RATE


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedClip:
    """A clip that a model of the mini family generates."""

    prompt: str
    seed: int
    duration: float
    """Seconds."""
    model: str
    domain: str = "generated"

    @property
    def name(self) -> str:
        """Prompt and seed."""
        return f"{self.model}, seed {self.seed}: {self.prompt}"

    @property
    def digest(self) -> str:
        """SHA-256 of all that determines the clip, the model included."""
        return _digest("generated", asdict(self), self.model)

    def read(self) -> tuple[Waveform, int]:
        """Generate it, with the model's own number of steps and guidance."""
        pipeline = _pipeline(self.model)
        output = pipeline([self.prompt], generator=[clip_generator(self.seed)], duration=self.duration)
        return output.waveforms_BN[0], output.sampling_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A prompt, its meaning, and the clip that is right for it."""

    prompt: str
    truth: CaptionTruth
    clip: Clip


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """A truth and the same with one mistake."""

    right: Side
    wrong: Side
    mistake: str


def soundworld_examples(config: SoundworldData, split: Split) -> Examples:
    """Return the labels and pairs of the contrasts of a split."""
    return Examples(
        labelled=tuple(
            example for index in _range(config, split) for example in labels(config, split, index)
        ),
        pairs=tuple(pair for index in _range(config, split) for pair in pairs(config, split, index)),
    )


def labels(config: SoundworldData, split: Split, index: int) -> Iterator[Labelled]:
    """Yield the labels of both prompts for both clips."""
    found = contrast(config, split, index)
    errs = _errors(config, split, index, 0)
    for side in (found.right, found.wrong):
        for other in (found.right, found.wrong):
            label = float((side is other) != next(errs))
            yield Labelled(prompt=side.prompt, clip=other.clip, label=label, truth=side.truth)


def pairs(config: SoundworldData, split: Split, index: int) -> Iterator[Pair]:
    """Yield a pair for each prompt: its own clip against the other's."""
    found = contrast(config, split, index)
    errs = _errors(config, split, index, 1)
    sides = ((found.right, found.wrong, found.mistake), (found.wrong, found.right, BACKWARDS[found.mistake]))
    for side, other, kind in sides:
        chosen, rejected = (other, side) if next(errs) else (side, other)
        yield Pair(
            prompt=side.prompt, chosen=chosen.clip, rejected=rejected.clip, kind=kind, truth=side.truth
        )


def contrast(config: SoundworldData, split: Split, index: int) -> Contrast:
    """Make contrast number `index` of a split; those from `held_out` on are generated."""
    numbers = [config.seed, SPLITS.index(split), index]
    rng = np.random.default_rng(numbers)
    scenes = SceneConfig(single=0.1, sequence=0.65)
    if rng.uniform() < config.long:
        scenes = SceneConfig(duration=5.12, single=0.1, sequence=0.65, three=0.35)
    rebuilt = rng.uniform() < config.rebuilt
    while True:
        truth = draw_truth(rng, scenes)
        kinds, shares = zip(*MISTAKES[truth.relation], strict=True)
        mistake = str(rng.choice(kinds, p=shares))
        truths = truth, _mistaken(truth, mistake, scenes, rng)
        prompts = [wording(one, rng, split) for one in truths]
        if all(prompts):
            break
    sides = []
    for number, (one, prompt) in enumerate(zip(truths, prompts, strict=True)):
        assert prompt is not None
        gain = float(rng.uniform(*GAIN))
        clip: Clip = SceneClip(
            truth=one,
            seed=(*numbers, number),
            duration=scenes.duration,
            gain=gain,
            model=config.model if rebuilt else None,
        )
        if split != "train" and index >= config.held_out:
            clip = GeneratedClip(prompt=prompt, seed=index, duration=scenes.duration, model=config.model)
        sides.append(Side(prompt=prompt, truth=one, clip=clip))
    return Contrast(right=sides[0], wrong=sides[1], mistake=mistake)


def wording(truth: CaptionTruth, rng: np.random.Generator, split: Split) -> str | None:
    """Return a wording of `truth` that belongs to `split`; None if none was found."""
    captions = (write_caption(truth, rng) for _ in range(WORDINGS))
    return next((caption for caption in captions if split_of(caption) == split), None)


def _mistaken(
    truth: CaptionTruth, mistake: str, scenes: SceneConfig, rng: np.random.Generator
) -> CaptionTruth:
    if mistake != "other":
        return {"swapped": swap, "missing": drop, "replaced": replace_event}[mistake](truth, rng)
    while True:
        other = draw_truth(rng, scenes)
        if not set(other.classes) & set(truth.classes):
            return other


def _range(config: SoundworldData, split: Split) -> range:
    if not config.contrasts:
        return range(0)
    extra = config.generated if split == "test" else 0
    return range(config.contrasts if split == "train" else config.held_out + extra)


def _errors(config: SoundworldData, split: Split, index: int, what: Literal[0, 1]) -> Iterator[bool]:
    """Yield for each example whether the majority of annotators errs; held-out examples are the oracle's."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index, 2 + what])
    noise = config.noise if split == "train" else 0.0
    while True:
        yield bool((rng.uniform(size=config.annotators) < noise).sum() * 2 > config.annotators)


def _digest(what: str, parts: dict[str, object], model: str | None) -> str:
    version = read_manifest(mini_folder(model)).digest if model else ""
    return hashlib.sha256(json.dumps([what, parts, version]).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _pipeline(model: str) -> TangoPipeline:
    pipeline = load_tango(mini_folder(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def _rebuild(waveform: Waveform, model: str) -> Waveform:
    """Return a clip as the model's decoder and vocoder render it."""
    pipeline = _pipeline(model)
    latents = pipeline.encode_audio(torch.from_numpy(waveform)[None])
    rebuilt: Waveform = pipeline.decode(latents)[0].numpy()
    return rebuilt
