"""Recipes of the whole loop: the settings of every stage, in one config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal

from training.evaluation.config import (
    EvaluationConfig,
    WorldPrompts,
    evaluation_mini,
    evaluation_smoke,
    evaluation_tango2,
)
from training.finetuning.dpo import DpoTraining
from training.finetuning.sft import SftTraining
from training.loop.checks import Parallel, Range, check_ranges
from training.preferences.captions import SoundworldCaptions
from training.preferences.pairs import PairsConfig
from training.preferences.pipeline import (
    PreferencesConfig,
    preferences_mini,
    preferences_smoke,
    preferences_tango2,
)
from training.preferences.scores import ScoresConfig
from training.reward.train import RewardTraining
from training.runs.recipes import (
    dpo_mini,
    dpo_smoke,
    dpo_tango2,
    reward_baton,
    reward_mini,
    reward_smoke,
    sft_mini,
    sft_smoke,
    sft_tango2,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopRun:
    """Settings of the whole loop. Each stage passes its result (model, data set) to the next."""

    name: str
    """Name of the run, of its folder and in MLflow."""
    reward: RewardTraining
    preferences: PreferencesConfig
    sft: SftTraining
    dpo: DpoTraining
    evaluation: EvaluationConfig
    start: str = "mini-base"
    """URI of the model to align. An alias means the version that it points to when the run begins."""
    with_reward: bool = True
    """Train the reward model; otherwise `preferences.scores` chooses the scorers."""
    trainings: tuple[Literal["sft", "dpo"], ...] = ("dpo",)
    """Trainings of a round, in order, each from the model of the one before. DPO's reference is the model
    that the round began with, so that ``sft,dpo`` is Tango 2's order."""
    rounds: Annotated[int, Range(1, 1000)] = 1
    """Rounds of alignment: each samples from the policy of the one before, ranks and trains again. With dpo,
    CRPO's rounds (arXiv 2412.21037); with sft, RAFT (arXiv 2304.06767)."""
    processes: Parallel = 1
    """Processes of each training program, one per accelerator; more than one: by ``accelerate launch``."""
    alias: str = "challenger"
    """Alias of the registered versions."""
    samples: tuple[str, ...] = ("A dog barks then a siren wails", "A cat meows after a bell tolls")
    """Prompts whose clips, before and after alignment, are logged with the run."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.trainings or len(set(self.trainings)) < len(self.trainings):
            raise ValueError(f"trainings is {','.join(self.trainings) or 'empty'}, must name each once")


def ranked_mini(per_cluster: int) -> PreferencesConfig:
    """Pairs of `mini-base`'s own clips, mostly of sequences, with `per_cluster` captions of each of 40 kinds.

    The best and the worst of four clips by the embedded reward model: CLAP does not represent order.
    """
    mini = preferences_mini()
    return replace(
        mini,
        captions=replace(
            mini.captions,
            clusters=40,
            per_cluster=per_cluster,
            soundworld=SoundworldCaptions(count=6_000, single=0.05, sequence=0.8),
        ),
        candidates=replace(mini.candidates, strategies=("1.2",), clips=4, steps=12),
        scores=ScoresConfig(reward="mini:reward"),
        pairs=PairsConfig(mode="ranked", rank_by="reward", margin=3.0),
    )


def run_mini() -> LoopRun:
    """`mini-base`, trained on wrong captions, learns from its own clips, ranked by the reward model."""
    return LoopRun(
        name="mini",
        reward=reward_mini(),
        preferences=ranked_mini(per_cluster=15),
        sft=sft_mini(),
        dpo=dpo_mini(),
        evaluation=replace(evaluation_mini(), world=WorldPrompts(count=150), seeds=1, set_resamples=0),
    )


def run_align() -> LoopRun:
    """The recipe of the training Job (`k8s/jobs/align.yaml`): `mini` under another name.

    It needs the pod and the registry, and no service. To start from the served version: ``start=
    models:/milonga-tango@champion``. Clips and scores from services: docs/training.md.
    """
    return replace(run_mini(), name="align")


def run_mini_sft_dpo() -> LoopRun:
    """`mini` in Tango 2's order: SFT on the chosen clips, then DPO, with `mini-base` as its reference."""
    return replace(run_mini(), name="mini-sft-dpo", trainings=("sft", "dpo"))


def run_mini_raft() -> LoopRun:
    """`mini-base` learns online from rewards: RAFT (arXiv 2304.06767), three rounds of SFT on the best of 4.

    Each round samples from the policy, and learns from the clip of the highest reward of each caption. A
    policy gradient as Flow-GRPO's (arXiv 2505.05470) passes each clip through the denoiser with gradients at
    every step of inference: for 8 steps, 8 times RAFT's training, and it needs a stochastic solver.
    """
    mini = run_mini()
    return replace(
        mini,
        name="mini-raft",
        preferences=replace(mini.preferences, pairs=replace(mini.preferences.pairs, margin=0.0)),
        sft=replace(mini.sft, loop=replace(mini.sft.loop, steps=75)),
        trainings=("sft",),
        rounds=3,
    )


def run_smoke() -> LoopRun:
    """Every stage in as few steps as possible. It learns nothing."""
    return LoopRun(
        name="smoke",
        reward=reward_smoke(),
        preferences=replace(
            preferences_smoke(),
            candidates=replace(preferences_smoke().candidates, strategies=("1.2",)),
            pairs=PairsConfig(mode="ranked", rank_by="reward"),
        ),
        sft=sft_smoke(),
        dpo=dpo_smoke(),
        evaluation=evaluation_smoke(),
        trainings=("sft", "dpo"),
        samples=("A dog barks",),
    )


def run_tango2() -> LoopRun:
    """Tango 2 (arXiv 2404.09956): Audio-alpaca by two CLAP models, one epoch of SFT, four of DPO.

    Give ``preferences.captions.source``, ``start`` and ``preferences.candidates.source.model``
    (Tango-full-FT, converted), the CLAP checkpoints, and ``processes``.
    """
    return LoopRun(
        name="tango2",
        reward=reward_baton(),
        preferences=preferences_tango2(),
        sft=sft_tango2(),
        dpo=dpo_tango2(),
        evaluation=evaluation_tango2(),
        start="file:tango-full-ft-audiocaps",
        with_reward=False,
        trainings=("sft", "dpo"),
        processes=2,
        samples=("A dog barks and then a siren wails in the distance",),
    )


RUNS: Final[Mapping[str, Callable[[], LoopRun]]] = {
    "align": run_align,
    "mini": run_mini,
    "mini-raft": run_mini_raft,
    "mini-sft-dpo": run_mini_sft_dpo,
    "smoke": run_smoke,
    "tango2": run_tango2,
}
"""Recipes of `milonga train run`."""
