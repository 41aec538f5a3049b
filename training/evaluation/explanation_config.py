"""Settings and recipes of `milonga train evaluate-explanations`. Imports no judge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from services.api.explanation import ATTENTION, MASK, OCCLUSION
from training.loop.checks import Count, Natural, Range, Seed, check_ranges
from training.soundworld.scenes import Split

METHODS: Final = (OCCLUSION, ATTENTION, MASK)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplanationEvaluation:
    """How explanations of a model of the sound world are compared with the truth."""

    name: str = "mini"
    """Name of the recipe."""
    model: str = "mini"
    """URI of the generator."""
    judge: str = "mini:tagger"
    """URI of the tagger that says when the events of generated clips are."""
    methods: tuple[str, ...] = METHODS
    """Methods to compare."""
    true_clips: Count = 200
    """Rendered scenes, noised: when their events are is known exactly."""
    generated_clips: Natural = 200
    """Clips that the model makes, in which the judge finds every event of the prompt; others are left out."""
    sanity_clips: Natural = 40
    """True clips that are also explained by a model of shuffled weights, and with another clip's prompt."""
    world: Seed = 40_016
    """Seed of the scenes."""
    split: Split = "test"
    """Split of the captions."""
    num_inference_steps: Count = 10
    """Denoising steps of generated clips, and noise levels of true ones."""
    iterations: Count = 25
    """Most iterations of the mask."""
    areas_points: Annotated[int, Range(1, 100)] = 2
    """Noise levels of the areas of deletion and insertion."""

    def __post_init__(self) -> None:
        check_ranges(self)
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"methods are {', '.join(self.methods)}, must be some of {', '.join(METHODS)}")


def explanations_mini() -> ExplanationEvaluation:
    """Return the recipe for the mini family: an hour of one core."""
    return ExplanationEvaluation()


def explanations_smoke() -> ExplanationEvaluation:
    """Return a recipe for tests: seconds, with too few clips for any conclusion."""
    return ExplanationEvaluation(
        name="smoke",
        true_clips=3,
        generated_clips=1,
        sanity_clips=1,
        num_inference_steps=4,
        iterations=2,
        areas_points=1,
    )


EXPLANATIONS: Final[Mapping[str, Callable[[], ExplanationEvaluation]]] = {
    "mini": explanations_mini,
    "smoke": explanations_smoke,
}
"""Recipes of `milonga train evaluate-explanations`."""
