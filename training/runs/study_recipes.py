"""Recipes of the study: the settings of every method that is compared, in one config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from training.evaluation.config import (
    EvaluationConfig,
    Sampling,
    WorldPrompts,
    evaluation_mini,
    evaluation_smoke,
)
from training.finetuning.baton import BatonTraining
from training.finetuning.dpo import DpoTraining
from training.finetuning.sft import SftTraining
from training.preferences.pairs import PairsConfig
from training.preferences.pipeline import PreferencesConfig, preferences_smoke
from training.preferences.scores import ScoresConfig
from training.runs.recipes import baton_mini, baton_smoke, dpo_mini, dpo_smoke, sft_mini, sft_smoke
from training.runs.run_recipes import ranked_mini

Variant = Literal["sft", "dpo", "baton", "rounds"]
VARIANTS: Final[tuple[Variant, ...]] = get_args(Variant)
"""In the order of the tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """Alignment methods side by side: from one start, on the same pairs, each with several training seeds.

    What links the stages (models, data sets, seeds, caches) is filled in from one to the next.
    """

    name: str
    """Of the run, as its folder and in MLflow."""
    preferences: PreferencesConfig
    """Of the pairs that all methods learn from, sampled from the start."""
    sft: SftTraining
    """On the chosen clips."""
    dpo: DpoTraining
    """On the pairs; the reference is the start."""
    baton: BatonTraining
    """On the pairs' clips, each by its reward."""
    second_preferences: PreferencesConfig
    """Of the second round's pairs, sampled from what DPO made."""
    second: DpoTraining
    """DPO on them, from what DPO made, which is the reference as well (CRPO, arXiv 2412.21037)."""
    evaluation: EvaluationConfig
    start: str = "mini-base"
    """URI of the model that is aligned."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings (`loop.seed`), one of each method for each."""
    variants: tuple[Variant, ...] = VARIANTS
    """Methods; `rounds` goes on from `dpo`."""
    processes: int = 1
    """Processes, one an accelerator, of each training program; more than one: by ``accelerate launch``."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}, must be 1 or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {_listed(self.seeds)}, must be different numbers, each 0 or more")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants is {_listed(self.variants)}, must name methods, each once")
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"variants has {_listed(unknown)}; there are {_listed(VARIANTS)}")
        if "rounds" in self.variants and "dpo" not in self.variants:
            raise ValueError(f"variants is {_listed(self.variants)}; rounds goes on from dpo, so add dpo")


def run_mini_study() -> StudyRun:
    """`mini-base` by every method, three training seeds each, and all of them on the test split.

    The test split is touched here and nowhere else: settings are chosen on the validation split.
    """
    preferences = ranked_mini(per_cluster=40)
    dpo = dpo_mini()
    return StudyRun(
        name="mini-study",
        preferences=preferences,
        sft=sft_mini(),
        dpo=dpo,
        baton=baton_mini(),
        second_preferences=replace(ranked_mini(per_cluster=10), pairs=replace(preferences.pairs, margin=2.0)),
        # As many passes over its fewer pairs as the first round made: 100 steps drifted far.
        second=replace(dpo, epochs=10.0, loop=replace(dpo.loop, warmup=5, decay=0.75)),
        evaluation=replace(
            evaluation_mini(),
            world=WorldPrompts(split="test", count=500),
            seeds=2,
            sampling=Sampling(num_inference_steps=12),
            set_resamples=100,
        ),
    )


def run_study_smoke() -> StudyRun:
    """Every stage in as few steps as it takes to go through it. It learns nothing."""
    smoke = preferences_smoke()
    preferences = replace(
        smoke,
        candidates=replace(smoke.candidates, strategies=("1.2",)),
        scores=ScoresConfig(reward="mini:reward"),
        pairs=PairsConfig(mode="ranked", rank_by="reward"),
    )
    return StudyRun(
        name="study-smoke",
        preferences=preferences,
        sft=sft_smoke(),
        dpo=dpo_smoke(),
        baton=replace(baton_smoke(), reward="mini:reward"),
        second_preferences=preferences,
        second=dpo_smoke(),
        evaluation=evaluation_smoke(),
        seeds=(0,),
    )


STUDIES: Final[Mapping[str, Callable[[], StudyRun]]] = {
    "mini-study": run_mini_study,
    "study-smoke": run_study_smoke,
}
"""Recipes of `milonga train run`, beside `training.runs.run_recipes.RUNS`."""


def _listed(items: tuple[object, ...] | list[Variant]) -> str:
    return ",".join(map(str, items)) or "empty"
