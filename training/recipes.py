"""Recipes: functions that return a whole config. A variant is `replace(recipe(), …)`, or ``--set``."""

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from services.errors import FieldViolation, InvalidInputError
from training.loop import LoopConfig
from training.reward_data import DataConfig
from training.reward_scenes import SoundworldData
from training.train_reward import HeadConfig, RewardTraining

Recipe = TypeVar("Recipe")


def reward_mini() -> RewardTraining:
    """The embedded reward model: minutes on two cores, from annotators who err one time in twenty."""
    return RewardTraining(
        name="reward",
        clap="mini:clap-a",
        objective="both",
        data=DataConfig(
            soundworld=SoundworldData(contrasts=2_000, rebuilt=0.2, generated=50, noise=0.05), workers=2
        ),
        loop=LoopConfig(
            steps=900, batch=32, learning_rate=1e-3, warmup=100, ema=0.995, device="cpu", threads=1
        ),
        label_smoothing=0.05,
        evaluate_every=100,
        patience=4,
    )


def reward_smoke() -> RewardTraining:
    """Seconds, for tests: a few steps on a few scenes. It learns nothing."""
    return RewardTraining(
        name="smoke",
        clap="mini:clap-a",
        objective="both",
        data=DataConfig(soundworld=SoundworldData(contrasts=12, held_out=6, long=0.0, rebuilt=0.0)),
        loop=LoopConfig(steps=6, batch=4, warmup=2, device="cpu", threads=1),
        head=HeadConfig(width=16, heads=2, layers=1, feedforward=16),
        evaluate_every=3,
    )


def reward_baton() -> RewardTraining:
    """BATON's reward model (arXiv 2402.00744) on LAION's CLAP: binary cross-entropy on people's labels.

    Give ``data.labelled`` and ``data.audio_root``. The objective and the frozen CLAP are the paper's. Its
    learning rate and number of steps are not known to us: these are ours, for about 2,700 labelled clips. So
    is the head: the paper's is a multilayer perceptron on pooled embeddings.
    """
    return RewardTraining(
        name="baton",
        clap="laion:630k-audioset-best.pt",
        objective="bce",
        data=DataConfig(workers=4),
        loop=LoopConfig(
            steps=2_000, batch=64, learning_rate=1e-4, warmup=100, weight_decay=0.05, mixed_precision="bf16"
        ),
        head=HeadConfig(width=256, heads=8, layers=2, feedforward=512, dropout=0.2),
        label_smoothing=0.05,
        evaluate_every=50,
        patience=10,
        license="CC-BY-NC-SA-4.0",
    )


REWARD: Final[Mapping[str, Callable[[], RewardTraining]]] = {
    "mini": reward_mini,
    "smoke": reward_smoke,
    "baton": reward_baton,
}
"""Recipes of `milonga train reward`."""


def recipe(recipes: Mapping[str, Callable[[], Recipe]], name: str) -> Recipe:
    """The config of the recipe `name`. Raises `InvalidInputError` where there is none."""
    if name not in recipes:
        raise InvalidInputError(
            FieldViolation("--recipe", f"is {name!r}, must be one of {', '.join(recipes)}")
        )
    return recipes[name]()
