"""What the reward model's probability means, in words."""

from typing import Final

from services.api.scoring import Reward

LIKED: Final = 0.65
"""Probability from which the reward model likes a clip. It dislikes one below 1 minus that."""


def verdict(reward: Reward) -> str:
    """Return a verb: likes, does not like, is undecided about, or can't judge."""
    if not reward.readable:
        return "can't judge"
    if reward.probability >= LIKED:
        return "likes"
    return "does not like" if reward.probability < 1 - LIKED else "is undecided about"


def opinion(reward: Reward) -> str:
    """Return a sentence on a clip."""
    if not reward.readable:
        return "The reward model can't judge it: it knows no word of the prompt."
    shown = "less than 0.01" if reward.probability < 0.01 else f"{reward.probability:.2f}"
    return f"The reward model {verdict(reward)} it: probability {shown} that a listener calls it right."
