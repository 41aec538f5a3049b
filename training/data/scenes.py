"""Labelled clips and preference pairs of the sound world.

A contrast has two sides: a truth, and the same truth with one mistake (order swapped, an event missing or
replaced, at the same time instead of one after the other) or another truth; with a prompt and a clip for
each. Crossed, they give four labels and two pairs. Each clip is correct for one prompt and wrong for the
other, so the label follows neither from the prompt nor from the clip alone. The exception is a clip without
an event (silence, noise): it is wrong for its prompt and has none of its own; two labels and one pair.
Everything is a function of (seed, split, index).
"""

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import torch

from services.models.clap.model import Waveform
from services.models.latent import clip_generator
from services.models.manifest import read_manifest
from services.models.mini import mini_folder
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from training.data.examples import Clip, Examples, LabelledClip, Pair
from training.loop.checks import ErrorRate, Natural, Range, Seed, Share, check_ranges
from training.soundworld.captions import (
    CaptionTruth,
    Relation,
    drop,
    replace_event,
    swap,
    write_caption,
)
from training.soundworld.scenes import (
    BACKGROUNDS,
    SceneConfig,
    Split,
    background,
    draw_truth,
    render,
    split_of,
)
from training.soundworld.synthesis import SAMPLING_RATE

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
GAIN = (-8.0, 2.0)
"""Bounds of the gain of a clip, in dB."""
MISTAKES = {
    "then": (
        *(("swapped", 0.4), ("missing", 0.12), ("replaced", 0.12), ("together", 0.12), ("other", 0.14)),
        *(("empty", 0.1),),
    ),
    "while": (("missing", 0.22), ("replaced", 0.22), ("apart", 0.3), ("other", 0.16), ("empty", 0.1)),
    "single": (("replaced", 0.55), ("other", 0.25), ("empty", 0.2)),
}
"""Mistakes by the relation of the events, with their probabilities. `together`: events at the same time that
should follow each other; `apart`: the reverse. `other`: no event of the prompt. `empty`: no event at all. A
reward model trained on near misses alone may like clips that have nothing to do with the prompt."""
REVERSED_MISTAKES = {
    "swapped": "swapped",
    "missing": "added",
    "replaced": "replaced",
    "other": "other",
    "together": "apart",
    "apart": "together",
}
"""The mistake in the original clip with respect to the altered prompt."""
UNREAD = 0.1
"""Share of the captions in training a reward model with a word that is not of the grammar."""
PARAPHRASES = 64
"""Captions that `paraphrase` tries."""
_loading = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundworldData:
    """Number and kind of contrasts, and simulated annotators."""

    contrasts: Natural
    """Contrasts of the training split."""
    held_out: Natural = 200
    """Contrasts of the validation split, and of the test split."""
    generated: Natural = 0
    """Additional contrasts of the test split, whose clips `model` generates from the two prompts."""
    seed: Seed = 1_010
    """Random seed; not one that the CLAP models were trained with."""
    long: Share = 0.2
    """Share of clips of 5.12 s; the others are of 2.56 s."""
    rebuilt: Share = 0.3
    """Share of contrasts whose clips are reconstructed by `model`'s autoencoder and vocoder."""
    model: str = "mini"
    """Model of the mini family that reconstructs and generates clips."""
    noise: ErrorRate = 0.0
    """Error rate of an annotator in the training split; labels of the other splits are correct."""
    annotators: Annotated[int, Range(1, 10**6)] = 1
    """Annotators per example, an odd number; the label is their majority vote."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.annotators % 2 != 1:
            raise ValueError(f"annotators is {self.annotators}, must be odd")


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneClip:
    """A clip rendered from a truth; with `model`, reconstructed by its autoencoder and vocoder."""

    truth: CaptionTruth
    seed: tuple[int, ...]
    duration: float
    """Seconds."""
    gain: float
    """dB."""
    model: str | None = None

    @property
    def name(self) -> str:
        """Seed and events."""
        return f"scene {'-'.join(map(str, self.seed))} ({', '.join(self.truth.classes)})"

    @property
    def domain(self) -> str:
        """real, or rebuilt if it is reconstructed by a model."""
        return "real" if self.model is None else "rebuilt"

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the clip, the model included."""
        return _digest("scene", asdict(self), self.model)

    def read(self) -> tuple[Waveform, int]:
        """Render the clip."""
        waveform, _ = render(self.truth, self.duration, np.random.default_rng(self.seed))
        waveform = waveform * np.float32(10 ** (self.gain / 20))
        return waveform if self.model is None else _rebuild(waveform, self.model), SAMPLING_RATE


@dataclass(frozen=True, kw_only=True, slots=True)
class EmptyClip:
    """A clip without an event: one of `BACKGROUNDS`."""

    kind: str
    seed: tuple[int, ...]
    duration: float
    """Seconds."""
    domain: str = "empty"

    @property
    def name(self) -> str:
        """Kind and seed."""
        return f"{self.kind} {'-'.join(map(str, self.seed))}"

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the clip."""
        return _digest("empty", asdict(self), None)

    def read(self) -> tuple[Waveform, int]:
        """Draw the clip."""
        return background(self.kind, self.duration, np.random.default_rng(self.seed)), SAMPLING_RATE


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedClip:
    """A clip generated by a model of the mini family."""

    prompt: str
    seed: int
    duration: float
    """Seconds."""
    model: str
    domain: str = "generated"

    @property
    def name(self) -> str:
        """Model, seed and prompt."""
        return f"{self.model}, seed {self.seed}: {self.prompt}"

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the clip, the model included."""
        return _digest("generated", asdict(self), self.model)

    def read(self) -> tuple[Waveform, int]:
        """Generate the clip, with the model's default steps and guidance."""
        pipeline = _pipeline(self.model)
        output = pipeline(
            [self.prompt], generator=[clip_generator(self.seed)], audio_length_in_s=self.duration
        )
        return output.audios[0], output.sampling_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastSide:
    """A prompt, its truth, and a clip of that truth."""

    prompt: str | None
    """None of a clip without an event, which no prompt describes."""
    truth: CaptionTruth | None
    clip: Clip


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """A truth, and the same truth with one mistake."""

    original: ContrastSide
    altered: ContrastSide
    mistake: str
    """Kind of mistake, see `MISTAKES`."""


def soundworld_examples(config: SoundworldData, split: Split) -> Examples:
    """Return the labelled clips and the pairs of all contrasts of a split."""
    return Examples(
        labelled=tuple(
            example for index in _indices(config, split) for example in labelled_clips(config, split, index)
        ),
        pairs=tuple(pair for index in _indices(config, split) for pair in pairs(config, split, index)),
    )


def labelled_clips(config: SoundworldData, split: Split, index: int) -> Iterator[LabelledClip]:
    """Yield the labels of a contrast: each prompt with each clip."""
    found = contrast(config, split, index)
    errors = _annotation_errors(config, split, index, 0)
    for side in (found.original, found.altered):
        for other in (found.original, found.altered):
            if side.prompt is not None:
                label = float((side is other) != next(errors))
                yield LabelledClip(prompt=side.prompt, clip=other.clip, label=label, truth=side.truth)


def pairs(config: SoundworldData, split: Split, index: int) -> Iterator[Pair]:
    """Yield the pairs of a contrast: for each prompt its own clip, chosen, and the other, rejected."""
    found = contrast(config, split, index)
    errors = _annotation_errors(config, split, index, 1)
    for side, other, kind in (
        (found.original, found.altered, found.mistake),
        (found.altered, found.original, REVERSED_MISTAKES.get(found.mistake, found.mistake)),
    ):
        if side.prompt is None:
            continue
        chosen, rejected = (other, side) if next(errors) else (side, other)
        yield Pair(
            prompt=side.prompt, chosen=chosen.clip, rejected=rejected.clip, kind=kind, truth=side.truth
        )


def contrast(config: SoundworldData, split: Split, index: int) -> Contrast:
    """Return contrast `index` of a split. Held-out clips from index `config.held_out` on are generated."""
    numbers = [config.seed, SPLITS.index(split), index]
    rng = np.random.default_rng(numbers)
    scenes = SceneConfig(single=0.1, sequence=0.6)
    if rng.uniform() < config.long:
        scenes = SceneConfig(duration=5.12, single=0.1, sequence=0.6, three=0.35)
    rebuilt = rng.uniform() < config.rebuilt
    while True:
        truth = draw_truth(rng, scenes)
        kinds, shares = zip(*MISTAKES[truth.relation], strict=True)
        mistake = str(rng.choice(kinds, p=shares))
        truths = [truth] if mistake == "empty" else [truth, _alter(truth, mistake, scenes, rng)]
        unread = UNREAD if split == "train" else 0.0
        prompts = [paraphrase(one, rng, split, unread=unread) for one in truths]
        if all(prompts):
            break
    sides: list[ContrastSide] = []
    for number, (truth, prompt) in enumerate(zip(truths, prompts, strict=True)):
        assert prompt is not None
        gain = float(rng.uniform(*GAIN))
        clip: Clip = SceneClip(
            truth=truth,
            seed=(*numbers, number),
            duration=scenes.duration,
            gain=gain,
            model=config.model if rebuilt else None,
        )
        if split != "train" and index >= config.held_out:
            clip = GeneratedClip(prompt=prompt, seed=index, duration=scenes.duration, model=config.model)
        sides.append(ContrastSide(prompt=prompt, truth=truth, clip=clip))
    if mistake == "empty":
        kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        empty = EmptyClip(kind=kind, seed=(*numbers, 1), duration=scenes.duration)
        sides.append(ContrastSide(prompt=None, truth=None, clip=empty))
    return Contrast(original=sides[0], altered=sides[1], mistake=mistake)


def paraphrase(
    truth: CaptionTruth, rng: np.random.Generator, split: Split, *, unread: float = 0.0
) -> str | None:
    """Return a random caption of `truth` that belongs to `split`; None if `PARAPHRASES` tries found none.

    `unread` is that of `caption_parts`, for models that read captions; models that write captions get none.
    """
    captions = (write_caption(truth, rng, unread=unread) for _ in range(PARAPHRASES))
    return next((caption for caption in captions if split_of(caption) == split), None)


def _alter(truth: CaptionTruth, mistake: str, scenes: SceneConfig, rng: np.random.Generator) -> CaptionTruth:
    if mistake in ("together", "apart"):
        relation: Relation = "while" if mistake == "together" else "then"
        order = rng.permutation(len(truth.classes))[:2]
        return CaptionTruth(classes=tuple(truth.classes[i] for i in order), relation=relation)
    if mistake != "other":
        return {"swapped": swap, "missing": drop, "replaced": replace_event}[mistake](truth, rng)
    while True:
        other = draw_truth(rng, scenes)
        if not set(other.classes) & set(truth.classes):
            return other


def _indices(config: SoundworldData, split: Split) -> range:
    if not config.contrasts:
        return range(0)
    extra = config.generated if split == "test" else 0
    return range(config.contrasts if split == "train" else config.held_out + extra)


def _annotation_errors(
    config: SoundworldData, split: Split, index: int, stream: Literal[0, 1]
) -> Iterator[bool]:
    """Yield for each example whether the majority of annotators errs; never in held-out splits."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index, 2 + stream])
    noise = config.noise if split == "train" else 0.0
    while True:
        yield bool((rng.uniform(size=config.annotators) < noise).sum() * 2 > config.annotators)


def _digest(what: str, parts: dict[str, object], model: str | None) -> str:
    version = read_manifest(mini_folder(model)).digest if model else ""
    return hashlib.sha256(json.dumps([what, parts, version]).encode()).hexdigest()


def _pipeline(model: str) -> TangoPipeline:
    # Clips are read by several threads. Loading replaces functions of torch for all of them.
    with _loading:
        return _loaded(model)


@functools.lru_cache(maxsize=1)
def _loaded(model: str) -> TangoPipeline:
    pipeline = load_tango(mini_folder(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def _rebuild(waveform: Waveform, model: str) -> Waveform:
    """Return the reconstruction of a clip by the model's autoencoder and vocoder."""
    pipeline = _pipeline(model)
    latents = pipeline.encode_audio(torch.from_numpy(waveform)[None])
    rebuilt: Waveform = pipeline.decode(latents)[0].numpy()
    return rebuilt
