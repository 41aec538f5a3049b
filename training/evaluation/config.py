"""Settings and recipes of evaluations. Imports no judge, so that other recipes may import it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from training.evaluation.divergence import Convention
from training.loop.checks import (
    ClipSeconds,
    Count,
    Factor,
    Natural,
    Parallel,
    Range,
    Seed,
    Share,
    check_ranges,
)
from training.preferences.llm import LLMConfig
from training.soundworld.scenes import DURATIONS, Split

AUDIOSET_TAGGERS = ("panns", "passt")
"""Embedders with AudioSet's classes. Metrics have their kind as the label, as in papers."""
EMBEDDERS = ("tagger", "clap", "yamnet", *AUDIOSET_TAGGERS)
"""Kinds of embedding models."""
MINI_SCORERS = ("clap-a=mini:clap-a", "clap-b=mini:clap-b")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldPrompts:
    """Prompts of the sound world, used if no file of prompts is given. Their events are known, so the judge
    can compare them with the clips, and rendered scenes are the references."""

    count: Count = 300
    """Number of prompts."""
    split: Split = "validation"
    """Use `test` only for final results, never to choose a model or a setting."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Generation settings; None is the model's default."""

    duration: ClipSeconds | None = None
    """Seconds per clip."""
    num_inference_steps: Count | None = None
    guidance_scale: Factor | None = None
    scheduler: str | None = None
    profile: str | None = None
    """Profile of each model, whose settings are then its defaults: models may differ in them."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Prompts, generation settings, scorers and metrics of an evaluation."""

    name: str = "mini"
    """Name of the recipe."""
    prompts: Path | None = None
    """List (`services.lists`) of captions and, optionally, the paths of reference clips. None: the
    prompts of the first folder of clips among the sources, else the sound world's."""
    caption_column: str | None = None
    """Column of captions; None: prompt, captions, caption or text."""
    reference_column: str | None = None
    """Column of reference clips; None: reference, audio, location, … if there is one."""
    audio_root: Path | None = None
    """Folder of the reference clips; None: the folder of the file."""
    world: WorldPrompts = field(default_factory=WorldPrompts)
    seeds: Count = 2
    """Clips per prompt, each with its own seed."""
    first_seed: Seed = 0
    """Number of the first seed; evaluations with disjoint numbers share no noise."""
    sampling: Sampling = field(default_factory=Sampling)
    batch: Parallel = 8
    """Batch size of generation and of scoring. Affects metrics by rounding only."""
    device: str = "auto"
    dtype: str = "float32"
    """Data type of text encoder and denoiser: float32, bfloat16 or float16."""
    scorers: tuple[str, ...] = MINI_SCORERS
    """CLAP scorers, NAME=URI."""
    reward: str | None = "mini:reward"
    """URI of the reward model; None: no rewards."""
    reward_clap: str = "mini:clap-a"
    """URI of the CLAP model that the reward model is built on."""
    embedders: tuple[str, ...] = ("tagger:mini:tagger", "clap:mini:clap-b")
    """Embedding models of Fréchet distance and KAD: tagger:URI, clap:URI, yamnet:PATH, panns:PATH
    or passt:PATH. Those with classes (all but clap) also give KL and the inception score."""
    judge: str | None = "mini:tagger"
    """URI of the tagger that detects events; used only for prompts whose events are known."""
    captioner: str | None = None
    """URI of a captioner with a list of events, for the round trip; None: no figures of it."""
    ask: bool = False
    """Also ask a language model that takes audio whether each clip matches its prompt: the metric `asked`."""
    questions: LLMConfig = field(default_factory=LLMConfig)
    """Its endpoint, for `ask`."""
    unused_words: bool = False
    """Also report the share of clips with an event in the prompt that the model's denoiser hardly uses, in
    all and by class. Needs models with a denoiser, not folders; prompts of the sound world."""
    kl: Convention = "softmax"
    """Function from logits to the posteriors of KL: softmax or sigmoid."""
    inception_splits: Count = 1
    """Splits of the inception score; papers use 10, which needs thousands of clips."""
    set_resamples: Natural = 100
    """Bootstrap resamples of Fréchet distance, KAD and inception score; 0: no intervals for them."""
    max_unreadable: Share = 0.05
    """Maximum share of unreadable clips of a source; above it, the evaluation is refused."""
    sheet: Annotated[int, Range(0, 100)] = 6
    """Prompts in the spectrogram sheet."""
    comparisons: tuple[str, ...] = ()
    """Additional comparisons, NAME:AGAINST by names of sources. All are compared with the first anyway."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for scorer in self.scorers:
            if not all(scorer.partition("=")):
                raise ValueError(f"scorers has {scorer!r}, must be NAME=URI")
        for embedder in self.embedders:
            kind, _, location = embedder.partition(":")
            if kind not in EMBEDDERS or not location:
                raise ValueError(
                    f"embedders has {embedder!r}, must be tagger:URI, clap:URI, yamnet:PATH, panns:PATH or "
                    "passt:PATH"
                )
        for comparison in self.comparisons:
            name, _, against = comparison.partition(":")
            if not name or not against or name == against:
                raise ValueError(
                    f"comparisons has {comparison!r}, must be NAME:AGAINST, names of two sources"
                )
        for names in (
            [scorer.partition("=")[0] for scorer in self.scorers],
            list(map(label_of, self.embedders)),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"names of scorers and of embedders must differ, got {', '.join(names)}")
        if self.prompts is None and self.sampling.duration not in (None, *DURATIONS):
            raise ValueError(
                f"sampling.duration is {self.sampling.duration}; the sound world's prompts are of "
                f"{' or '.join(map(str, DURATIONS))} s"
            )


def label_of(embedder: str) -> str:
    """Return the name of an embedder in metrics: panns, passt, or the last part of its location."""
    kind, _, location = embedder.partition(":")
    return (
        kind
        if kind in ("yamnet", *AUDIOSET_TAGGERS)
        else Path(location.rpartition(":")[2].partition("#")[0]).stem
    )


def evaluation_mini() -> EvaluationConfig:
    """Return the recipe for the mini family on the sound world's validation prompts: minutes on two cores."""
    return EvaluationConfig()


def evaluation_smoke() -> EvaluationConfig:
    """Return a recipe for tests: a few seconds, with too few clips for any conclusion."""
    return EvaluationConfig(
        name="smoke",
        world=WorldPrompts(count=6),
        seeds=1,
        sampling=Sampling(num_inference_steps=4),
        embedders=("tagger:mini:tagger",),
        set_resamples=5,
        sheet=2,
    )


def evaluation_tango2() -> EvaluationConfig:
    """Return the recipe of the Tango 2 paper (arXiv 2404.09956): 200 steps, guidance 3, one clip per prompt.

    Give ``prompts`` (AudioCaps' test captions with their clips) and the paths of the checkpoints. The paper's
    FAD uses VGGish, which is not among the embedders; FD, KL and IS use PANNs at 16 kHz, as in audioldm_eval.
    """
    return EvaluationConfig(
        name="tango2",
        prompts=Path("audiocaps-test.csv"),
        seeds=1,
        sampling=Sampling(num_inference_steps=200, guidance_scale=3.0),
        dtype="bfloat16",
        scorers=("630k-audioset-best=laion:630k-audioset-best.pt", "630k-best=laion:630k-best.pt"),
        reward=None,
        embedders=("panns:Cnn14_16k_mAP=0.438.pth", "clap:laion:630k-audioset-best.pt"),
        judge=None,
        inception_splits=10,
        set_resamples=20,
    )


EVALUATIONS: Final[Mapping[str, Callable[[], EvaluationConfig]]] = {
    "mini": evaluation_mini,
    "smoke": evaluation_smoke,
    "tango2": evaluation_tango2,
}
"""Recipes of `milonga train evaluate`."""
