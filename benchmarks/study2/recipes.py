"""Recipes of studies: their settings by name."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Final

from benchmarks.study2.config import Prompts, StudyRun
from benchmarks.study2.recorded import RecordedSounds, RecordedStudy
from training.data.recorded_scenes import RecordedSceneConfig
from training.evaluation.config import Sampling, evaluation_mini, evaluation_smoke
from training.preferences.pairs import PairsConfig
from training.preferences.pipeline import preferences_smoke
from training.preferences.scores import ScoresConfig
from training.runs.recipes import (
    baton_mini,
    baton_smoke,
    dpo_mini,
    dpo_mini_crpo,
    dpo_mini_safeguarded,
    dpo_smoke,
    sft_mini,
    sft_smoke,
)
from training.runs.run_recipes import ranked_mini


def study_mini() -> StudyRun:
    """`mini-base` by every method, three training seeds each, and all of them on the test split."""
    ranked = ranked_mini(per_cluster=48)  # about 1,000 pairs
    eight = replace(ranked.candidates, steps=8, source=replace(ranked.candidates.source, threads=1))
    # 8 steps make clips as good as 25 on the sound world. Scored by the reward model only.
    preferences = replace(
        ranked,
        captions=replace(ranked.captions, soundworld=replace(ranked.captions.soundworld, count=20_000)),
        candidates=eight,
        scores=replace(ranked.scores, scorers=()),
        pairs=replace(ranked.pairs, margin=2.0),
    )
    fewer = replace(preferences, captions=replace(preferences.captions, per_cluster=8))
    dpo = dpo_mini()
    return StudyRun(
        name="mini-study-2",
        preferences=preferences,
        sft=sft_mini(),
        dpo=dpo,
        after_sft=dpo,
        safeguarded=dpo_mini_safeguarded(),
        crpo=dpo_mini_crpo(),
        baton=baton_mini(),
        second_preferences=fewer,
        second=replace(dpo, loop=replace(dpo.loop, steps=100, warmup=10, decay=0.9)),
        online_preferences=replace(fewer, pairs=replace(fewer.pairs, margin=0.0)),
        online=replace(sft_mini(), loop=replace(sft_mini().loop, steps=75)),
        scoring=replace(
            evaluation_mini(), sampling=Sampling(num_inference_steps=8), scorers=("clap-b=mini:clap-b",)
        ),
        prompts=Prompts(),
    )


def study_smoke() -> StudyRun:
    """Every stage in as few steps as possible. It learns nothing."""
    smoke = preferences_smoke()
    preferences = replace(
        smoke,
        candidates=replace(smoke.candidates, strategies=("1.2",)),
        # The embedded scorers may not know every word of so few captions.
        scores=ScoresConfig(scorers=(), reward="mini:reward", max_unreadable=0.5),
        pairs=PairsConfig(mode="ranked", rank_by="reward"),
    )
    return StudyRun(
        name="study-2-smoke",
        preferences=preferences,
        sft=sft_smoke(),
        dpo=dpo_smoke(),
        after_sft=dpo_smoke(),
        safeguarded=replace(dpo_smoke(), safeguard=0.0),
        crpo=replace(dpo_smoke(), chosen_weight=10.0),
        baton=replace(baton_smoke(), reward="mini:reward"),
        second_preferences=preferences,
        second=dpo_smoke(),
        online_preferences=preferences,
        online=sft_smoke(),
        scoring=replace(evaluation_smoke(), scorers=("clap-b=mini:clap-b",)),
        prompts=Prompts(split="validation", short=3, long=2, held_out=2),
        seeds=(0,),
        pairs=3,
        online_rounds=2,
        growth_pairs=(2,),
        growth_betas=(60.0,),
        judge_clips=40,
    )


def study_real() -> RecordedStudy:
    """A model of recorded sounds by SFT and by the variant that won on the sound world, three seeds each.

    Give ``start``, ``world.recordings`` and ``world.yamnet``. Steps, rates and beta are `study_mini`'s.
    """
    mini = study_mini()
    shared: dict[str, Any] = {one.name: getattr(mini, one.name) for one in fields(mini)}
    changed: dict[str, Any] = {
        "name": "real-study",
        "scoring": replace(
            mini.scoring,
            sampling=Sampling(num_inference_steps=12),
            scorers=(),
            reward=None,
            embedders=(),
            judge=None,
        ),
        "prompts": Prompts(long=0, held_out=0),
        "start": "file:build/new/mini-real-base",
        "methods": ("sft", "safeguarded"),
        "growth_pairs": (),
        "growth_betas": (),
    }
    return RecordedStudy(**shared | changed)


def study_real_smoke() -> RecordedStudy:
    """Every stage of `study_real` in as few steps as possible. It learns nothing."""
    real, smoke = study_real(), study_smoke()
    return replace(
        real,
        name="real-study-smoke",
        sft=smoke.sft,
        dpo=smoke.dpo,
        safeguarded=smoke.safeguarded,
        scoring=replace(real.scoring, seeds=1, sampling=Sampling(num_inference_steps=2), set_resamples=5),
        prompts=Prompts(split="validation", short=4, long=0, held_out=0),
        seeds=(0,),
        pairs=6,
        world=RecordedSounds(
            scenes=RecordedSceneConfig(duration=1.28, sampling_rate=16_000, single=0.0, sequence=0.7),
            fitting=40,
            calibration=20,
        ),
    )


RECIPES: Final[Mapping[str, Callable[[], StudyRun]]] = {
    "mini-study-2": study_mini,
    "study-2-smoke": study_smoke,
    "real-study": study_real,
    "real-study-smoke": study_real_smoke,
}
