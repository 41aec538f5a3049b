"""The settings of an evaluation, without the judge, so that recipes may import them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from training.evaluation.divergence import Convention
from training.soundworld.scenes import DURATIONS, Split

EMBEDDERS = ("tagger", "clap", "panns")
"""Kinds of embedders."""
MINI_SCORERS = ("clap-a=mini:clap-a", "clap-b=mini:clap-b")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldPrompts:
    """Prompts of the sound world, where no file of prompts is given. Their truth is known, so the judge can
    be asked, and scenes of the same truth are the reference."""

    count: int = 300
    """Prompts."""
    split: Split = "validation"
    """`test` is for the last table alone; whoever chooses by it has used it up."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"world.count is {self.count}, must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How clips are generated; None is the model's default."""

    duration: float | None = None
    """Seconds a clip."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is heard, and by whom."""

    name: str = "mini"
    """Of the recipe."""
    prompts: Path | None = None
    """CSV or JSON Lines with a caption a row, and perhaps the path of a reference clip. None: the prompts of
    the folder of clips, if one is evaluated, else the sound world's."""
    caption_column: str | None = None
    """Its column of captions; None: prompt, captions, caption or text."""
    reference_column: str | None = None
    """Its column of reference clips; None: reference, audio, location, … where there is one."""
    audio_root: Path | None = None
    """Folder of the reference clips; None: the file's own."""
    world: WorldPrompts = field(default_factory=WorldPrompts)
    seeds: int = 2
    """Clips a prompt, each of its own seed."""
    first_seed: int = 0
    """Number of the first of them; evaluations with other numbers share no noise."""
    sampling: Sampling = field(default_factory=Sampling)
    batch: int = 8
    """Clips that are denoised, and heard, together. Changes no figure beyond rounding."""
    device: str = "auto"
    dtype: str = "float32"
    """Of text encoder and denoiser: float32, bfloat16 or float16."""
    scorers: tuple[str, ...] = MINI_SCORERS
    """CLAP scorers, NAME=URI."""
    reward: str | None = "mini:reward"
    """URI of the reward model; None: no rewards."""
    reward_clap: str = "mini:clap-a"
    """URI of the CLAP model that it stands on."""
    embedders: tuple[str, ...] = ("tagger:mini:tagger", "clap:mini:clap-b")
    """Spaces of the Fréchet distance and KAD: tagger:URI, clap:URI or panns:PATH. Those with classes (all but
    CLAP) give KL and the inception score as well."""
    judge: str | None = "mini:tagger"
    """URI of the tagger that says which events were heard; asked only where the prompts' truth is known."""
    kl: Convention = "softmax"
    """How KL makes posteriors of logits: softmax or sigmoid."""
    inception_splits: int = 1
    """Parts of the inception score; papers take 10, which needs thousands of clips."""
    set_resamples: int = 100
    """Bootstrap draws of Fréchet distance, KAD and inception score; 0: no intervals for them."""
    max_unreadable: float = 0.05
    """Share of the clips of a folder that may be unreadable before the evaluation is refused."""
    sheet: int = 6
    """Prompts of the sheet of spectrograms."""
    comparisons: tuple[str, ...] = ()
    """Further comparisons, NAME:AGAINST by names of sources. All are compared with the first in any case."""

    def __post_init__(self) -> None:
        for name in ("seeds", "batch", "inception_splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 or more")
        for name in ("first_seed", "set_resamples", "sheet"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable is {self.max_unreadable}, must lie in [0, 1]")
        for scorer in self.scorers:
            if not all(scorer.partition("=")):
                raise ValueError(f"scorers has {scorer!r}, must be NAME=URI")
        for embedder in self.embedders:
            kind, _, location = embedder.partition(":")
            if kind not in EMBEDDERS or not location:
                raise ValueError(f"embedders has {embedder!r}, must be tagger:URI, clap:URI or panns:PATH")
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
    """A short name of ``KIND:LOCATION``, for figures: panns, or the last part of the location."""
    kind, _, location = embedder.partition(":")
    return kind if kind == "panns" else Path(location.rpartition(":")[2].partition("#")[0]).stem


def evaluation_mini() -> EvaluationConfig:
    """The mini family on the sound world's validation prompts: minutes on two cores."""
    return EvaluationConfig()


def evaluation_smoke() -> EvaluationConfig:
    """Seconds, for tests: far too few clips to conclude anything."""
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
    """The Tango 2 paper's evaluation (arXiv 2404.09956): give ``prompts`` (AudioCaps' test captions with
    their clips) and the checkpoints' paths. 200 steps, guidance 3, one clip a prompt. Its FAD is of VGGish,
    which is not among the embedders; FD, KL and IS are of PANNs, the 16 kHz checkpoint as audioldm_eval's."""
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
